/**
 * A bug of ours is contained: an exception costs at most the one conversation that it comes from, is shown once, and
 * stops no loop and no timer.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import type { Client } from "../client.ts";
import { hostOf, type KeyPair } from "../protocol.ts";
import { SERVER, typeOf } from "./hostile.ts";
import { createWorld, join, login, type Player, type World } from "./scenario.ts";
import { texts } from "./testing.ts";

// ---------------------------------------------------------------------------------------------------- the client

/** `generateKeys` and `random` come from outside: this is how a bug gets into the client at a place of our choice. */
interface Fuse {
  player: Player;
  /** From now on the calls of that method fail as soon as they want keys or (so many) random bytes; so many times. */
  arm(method: keyof Client, what: "keys" | "random", times?: number, length?: number): void;
  blown(): number;
}

function fused(world: World, name: string, nat: string): Fuse {
  const { bytes, keys } = world.stream(`${name} fuse`);
  let armed: { method: string; what: string; times: number; length: number | undefined } | null = null,
    current = "",
    blown = 0;
  const burn = <T>(what: "keys" | "random", value: T, length?: number): T => {
    if (armed?.method !== current || armed.what !== what || armed.times === 0) return value;
    if (armed.length !== undefined && armed.length !== length) return value;
    armed.times--;
    blown++;
    throw new TypeError(`No ${what} in "${current}"`);
  };
  const generateKeys = (): KeyPair => burn("keys", keys());
  const random = (length: number): Uint8Array => burn("random", bytes(length), length);
  const player = join(world, name, { nat, generateKeys, random });
  for (const method of ["opened", "receive", "wake", "command", "interfaces"] as const) {
    const work = player.client[method] as (...args: unknown[]) => unknown;
    (player.client[method] as unknown) = (...args: unknown[]) => {
      current = method;
      try {
        return work(...args);
      } finally {
        current = "";
      }
    };
  }
  return {
    player,
    arm: (method, what, times = 1, length) => void (armed = { method, what, times, length }),
    blown: () => blown,
  };
}

/** Alice, who has the bug, has a path to bob and knows carol; dora is on the relay with alice. */
function scene(ofAlice = "EIM+APDF random", ofCarol = "EIM+APDF random") {
  const world = createWorld({ seed: 21 }), fuse = fused(world, "alice", ofAlice), alice = fuse.player;
  const keys = world.keys(); // of carol, who may come again with the same
  const bob = join(world, "bob", { nat: "EIM+EIF random" }), dora = join(world, "dora", { direct: false });
  const carol = join(world, "carol", { nat: ofCarol, keys });
  login(world, alice, bob, carol, dora);
  world.net.run(5_000);
  let round = 0;
  /** Each way in the two other conversations; all arrive, once. */
  function talk(): void {
    const text = `round ${round++}`;
    for (const other of [bob, dora]) {
      alice.send(other.name, text);
      other.send("alice", text);
    }
    world.net.run(5_000);
    for (const other of [bob, dora]) {
      assert.equal(texts(other, "alice").filter((one) => one === text).length, 1, `${other.name} has heard "${text}"`);
      assert.equal(texts(alice, other.name).filter((one) => one === text).length, 1, `of ${other.name}: "${text}"`);
    }
    const failed = alice.events("sent").filter(({ to, ok }) => to !== "carol" && !ok);
    assert.deepEqual(failed, []);
  }
  talk();
  return { world, fuse, alice, bob, carol, dora, keys, talk };
}
type Scene = ReturnType<typeof scene>;

/** Nothing of what alice sends over the server reaches carol; until that is undone. */
function deafen(world: World, carol: Player): () => void {
  const home = carol.nat!.addresses[0]!;
  return world.net.block(({ from, to, data }) =>
    from === SERVER && hostOf(to) === home && ["P2PSOMEONEWANTTOCALLYOU", "RELAYED"].includes(typeOf(data))
  );
}

const bugs = (player: Player) => player.events("error").filter(({ code }) => code === "bug");

/** The bug has cost the sends to carol, of which there were so many, and nothing else. */
function expectContained({ world, fuse, alice, carol, talk }: Scene, pending: number, now = carol): void {
  assert.equal(fuse.blown(), 1, "the bug has shown itself");
  world.net.run(20_000);
  assert.equal(bugs(alice).length, 1, "events of a bug");
  assert.ok(bugs(alice).every(({ notice, fatal }) => notice === true && fatal === undefined));
  const outcomes = alice.events("sent").filter(({ to }) => to === "carol");
  assert.deepEqual(outcomes.map(({ ok }) => ok), Array(pending).fill(false), "what became of the sends to carol");
  talk();
  talk();
  for (const [i, text] of ["again", "and again"].entries()) { // another conversation with her can begin
    alice.send("carol", text);
    world.net.run(10_000);
    assert.equal(texts(now, "alice").at(-1), text);
    assert.equal(alice.events("sent").filter(({ to, ok }) => to === "carol" && ok).length, i + 1);
    now.send("alice", text);
    world.net.run(5_000);
    assert.equal(texts(alice, "carol").at(-1), text);
  }
  assert.equal(bugs(alice).length, 1, "events of a bug");
}

test("a bug in `command`: the send fails, and all else goes on", () => {
  const place = scene(), { fuse, alice } = place;
  fuse.arm("command", "keys");
  alice.send("carol", "lost");
  expectContained(place, 1);
});

test("a bug in `receive`, when the peer begins a handshake: what waits for that peer fails, all else goes on", () => {
  const place = scene(), { world, fuse, alice, carol } = place, undo = deafen(world, carol);
  alice.send("carol", "lost");
  alice.send("carol", "lost too");
  world.net.run(1_000);
  fuse.arm("receive", "keys");
  carol.send("alice", "hello");
  world.net.runUntil(() => fuse.blown() > 0, 5_000);
  undo();
  expectContained(place, 2);
  assert.equal(carol.events("sent").filter(({ to }) => to === "alice").length, 3, "carol's sends end, once each");
});

test("a bug in `wake`, when the peer has logged in again: what waits for that peer fails, all else goes on", () => {
  const place = scene(), { world, fuse, alice, carol, keys } = place, undo = deafen(world, carol);
  alice.send("carol", "lost");
  world.net.run(1_000);
  fuse.arm("wake", "keys");
  carol.process.stop();
  const again = join(world, "carol", { host: carol.host, keys });
  world.net.runUntil(() => fuse.blown() > 0, 10_000);
  undo();
  expectContained(place, 1, again);
});

test("a bug in `opened`, when fresh sockets are to make a path: what waits for that peer fails, all else goes on", () => {
  const place = scene("APDM+APDF sequential"), { world, fuse, alice } = place;
  fuse.arm("opened", "random");
  alice.send("carol", "lost");
  world.net.runUntil(() => fuse.blown() > 0, 5_000);
  expectContained(place, 1);
});

test("a bug in a command that belongs to no conversation: it is told, and all else goes on", () => {
  const { fuse, alice, carol, world, talk } = scene();
  fuse.arm("command", "random");
  alice.send("carol", ""); // which is refused under a random id
  assert.equal(fuse.blown(), 1);
  assert.equal(bugs(alice).length, 1);
  talk();
  alice.send("carol", "hello");
  world.net.run(5_000);
  assert.deepEqual(texts(carol, "alice"), ["hello"]);
});

for (const method of ["receive", "wake"] as const) {
  test(`a bug that shows itself in \`${method}\` again and again: it is told a few times, and all else goes on`, () => {
    const { world, fuse, alice, carol, talk } = scene();
    if (method === "receive") fuse.arm(method, "keys", Infinity);
    else fuse.arm("wake", "random", Infinity); // no conversation can probe or punch, whoever it is with
    for (let i = 0; i < 30; i++) {
      carol.send("alice", `to somebody who has a bug ${i}`);
      world.net.run(1_000);
    }
    assert.ok(fuse.blown() > 0);
    fuse.arm("wake", "keys", 0);
    const told = bugs(alice).length;
    assert.ok(told > 0 && told <= 20, `${told} events of a bug`);
    world.net.run(20_000);
    talk();
    carol.send("alice", "to somebody who is well again");
    world.net.run(10_000);
    assert.equal(texts(alice, "carol").at(-1), "to somebody who is well again");
  });
}

test("a bug while our NAT is found out ends that attempt: `nat` is answered, no socket stays open, the next one works", () => {
  const world = createWorld({ seed: 22 }), fuse = fused(world, "alice", "EIM+APDF random"), alice = fuse.player;
  const bob = join(world, "bob");
  login(world, alice, bob);
  world.net.run(5_000);
  alice.send("bob", "hi"); // so that she soon notices when the mapping is another one
  world.net.run(1_000);
  const open = new Set<number>(), { effects } = watchSockets(alice, open);
  fuse.arm("opened", "random");
  alice.nat!.flush();
  alice.send("bob", "still there?");
  world.net.run(5_000);
  assert.equal(fuse.blown(), 1, "the bug has shown itself");
  assert.ok(effects.opened > 0);
  alice.command({ command: "nat" });
  world.net.run(100);
  assert.equal(alice.events("nat").length, 1);
  world.net.run(20_000);
  assert.deepEqual([...open], []);
  alice.nat!.flush();
  alice.send("bob", "and again");
  world.net.run(20_000);
  alice.command({ command: "nat" });
  world.net.run(100);
  assert.deepEqual(alice.events("nat").map(({ filtering, allocation }) => [filtering, allocation]).at(-1), [
    "APDF",
    "random",
  ]);
  assert.equal(bugs(alice).length, 1);
});

test("a bug whenever something is due is told once, the client does not spin, and conversations go on", () => {
  const world = createWorld({ seed: 23 }), fuse = fused(world, "alice", "EIM+APDF random"), alice = fuse.player;
  const bob = join(world, "bob", { nat: "EIM+APDF random" });
  login(world, alice, bob);
  alice.send("bob", "hi");
  world.net.run(5_000);
  assert.equal(alice.path(), "direct");
  let wakes = 0;
  const { wake } = alice.client;
  alice.client.wake = (now) => {
    wakes++;
    return wake(now);
  };
  world.net.block(({ host }) => host === "server"); // so that she logs in again, which wants random bytes
  fuse.arm("wake", "random", Infinity, 8); // of that length is the id of a login
  world.net.runUntil(() => fuse.blown() > 1, 90_000);
  world.net.block(({ host }) => host === "alice" && world.net.now() % 3 < 1); // so that parts must be sent again
  for (let i = 0; i < 30; i++) {
    alice.send("bob", `m ${i}`);
    world.net.run(1_000);
  }
  assert.equal(texts(bob).length, 31);
  assert.ok(fuse.blown() > 1, "the bug shows again and again");
  assert.equal(bugs(alice).length, 1);
  assert.ok(wakes < 1_000, `${wakes} wakes`);
});

test("who is blocked at any moment of a call costs no socket: a NAT that counts its ports", () => {
  for (let ms = 0; ms < 1_200; ms += 20) {
    const world = createWorld({ seed: 24 }), open = new Set<number>();
    const alice = join(world, "alice", { nat: "APDM+APDF sequential" });
    const bob = join(world, "bob", { nat: "APDM+APDF sequential" });
    login(world, alice, bob);
    world.net.run(5_000);
    watchSockets(alice, open);
    alice.send("bob", "hi");
    world.net.run(ms);
    alice.command({ command: "block", peer: "bob" });
    world.net.run(5_000);
    assert.deepEqual([...open], [], `blocked after ${ms} ms`);
  }
});

/** Which sockets beyond the first one are open. */
function watchSockets({ client }: Player, open: Set<number>) {
  const effects = { opened: 0 };
  for (const method of ["opened", "receive", "wake", "command"] as const) {
    const work = client[method] as (...args: unknown[]) => ReturnType<Client["wake"]>;
    (client[method] as unknown) = (...args: unknown[]) => {
      const all = work(...args);
      for (const effect of all) {
        if (effect.kind === "open") open.add(effect.socket), effects.opened++;
        if (effect.kind === "close") open.delete(effect.socket);
      }
      return all;
    };
  }
  return { effects };
}

// ---------------------------------------------------------------------------------------------------- real sockets

interface Count {
  wakes: number;
  received: number;
  opened: number;
  events: number;
  sent: number;
}

/** Runs faulty.ts: what it printed, and how often it has shown the exception. */
function run(where: string): { faults: number; sick: Count; well: Count; shown: number } {
  const file = fileURLToPath(new URL("faulty.ts", import.meta.url).href);
  const args = "Deno" in globalThis ? ["run", "-A", "--no-check", "--unstable-net", file, where] : [file, where];
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8", timeout: 30_000 });
  assert.equal(status, 0, `it has ended:\n${stderr.slice(0, 2_000)}`);
  return { ...JSON.parse(stdout), shown: stderr.split("a-fault-of-ours").length - 1 };
}

/** The numbers are small, since the machine that this runs on may be busy: a loop that has ended stands still. */
for (const where of ["wake", "opened", "receive", "event", "wakeAt"]) {
  test(`listen(): a machine throws once in \`${where}\`: it is shown once, and loop and timers go on`, () => {
    const { faults, sick, well, shown } = run(where);
    assert.equal(faults, 1);
    assert.equal(shown, 1, `shown ${shown} times`);
    for (const { wakes, received, opened, events } of [sick, well]) {
      assert.ok(wakes >= 8 && events >= 7, `${wakes} wakes, ${events} events`);
      assert.ok(received >= 6, `${received} datagrams received`);
      assert.ok(opened >= 5, `${opened} sockets opened`);
    }
    if (where === "event") assert.equal(sick.opened, 10, "what was to be done behind the event is done all the same");
  });
}

test("listen(): a machine throws in each `wake`, and remains due: it does not spin, and goes on receiving", () => {
  const { sick, well } = run("always");
  assert.ok(sick.wakes > 0 && sick.wakes < 20, `${sick.wakes} wakes in a second`);
  assert.ok(sick.received >= 6, `${sick.received} datagrams received`);
  assert.ok(well.wakes >= 8, `${well.wakes} wakes of the other machine`);
});

test("listen(): what a machine throws in each `wake` is shown once, so that no log is flooded", () => {
  const { faults, shown } = run("always");
  assert.ok(faults > 0);
  assert.equal(shown, 1, `shown ${shown} times`);
});
