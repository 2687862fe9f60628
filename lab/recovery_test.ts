/**
 * Two who talk, when something breaks under them: the path dies, the server or a peer is started again, NATs forget,
 * clocks jump, names are taken.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { decode, hostOf } from "../protocol.ts";
import { random } from "./network.ts";
import { createWorld, crowd, D, join, login, type Player, R } from "./scenario.ts";
import { LONG, many, numbered, pair, texts } from "./testing.ts";

// ---------------------------------------------------------------------------------------------------- keeping a path

const HOURS = many(24, 2);
test(`${HOURS} virtual hours at 5 % loss: every message arrives, and no path is lost`, () => {
  const world = createWorld({ seed: 7, loss: 0.05 });
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  const next = random("day");
  const sent = { alice: 0, bob: 0 };
  for (let at = 0; at < HOURS * 3_600_000;) {
    const wait = next() * 60_000;
    at += wait;
    world.net.run(wait);
    if (next() < 0.5) alice.send("bob", `m ${sent.alice++}`);
    else bob.send("alice", `m ${sent.bob++}`);
  }
  world.net.run(10_000);
  assert.deepEqual(texts(bob), numbered(sent.alice));
  assert.deepEqual(texts(alice), numbered(sent.bob));
  for (const player of [alice, bob]) {
    assert.deepEqual(player.events("path").map(({ path }) => path), ["direct"]);
    assert.equal(player.events("reconnecting").length, 0);
  }
});

test("the path dies: the relay takes over within 0.5 s, a new path is found when it can be", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  alice.send("bob", "hi");
  world.net.run(2_000);
  const unblock = world.net.block(({ from, to }) => ![from, to].some((end) => end.startsWith("192.0.2.1")));
  const start = world.net.now();
  alice.send("bob", "now");
  world.net.run(5_000);
  assert.ok(
    bob.events("message")[1]!.at - start <= Math.max(500, 3 * D + R),
    `${bob.events("message")[1]!.at - start}`,
  );
  for (const player of [alice, bob]) assert.equal(player.path(), "relay");
  unblock();
  world.net.run(10_000);
  for (const player of [alice, bob]) assert.equal(player.path(), "direct");
});

test("both NATs forget everything while they talk: nothing is lost, and nothing stalls for more than 1.2 s", () => {
  for (let seed = 0; seed < many(50, 10); seed++) {
    const world = createWorld({ seed });
    const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
    alice.send("bob", "m 0");
    world.net.run(3_000 + seed * 13);
    const sentAt: number[] = [0];
    for (let i = 1; i < 60; i++) {
      if (i === 10) { for (const { nat } of [alice, bob]) nat!.flush(); }
      sentAt.push(world.net.now());
      alice.send("bob", `m ${i}`);
      world.net.run(50);
    }
    world.net.run(5_000);
    assert.deepEqual(texts(bob), numbered(60));
    const stall = Math.max(...bob.events("message").slice(1).map(({ at }, i) => at - sentAt[i + 1]!));
    assert.ok(stall <= 1_200, `seed ${seed}: ${stall}`);
    assert.equal(alice.path(), "direct");
    assert.equal(bob.path(), "direct");
  }
});

test("both are cut off for some seconds while nobody talks: the direct path comes back", () => {
  for (const outageMs of [2_000, 4_000, 5_000, 6_000, 8_000, 15_000]) {
    const world = createWorld();
    const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
    alice.send("bob", "hi");
    world.net.run(3_000);
    const unblock = world.net.block(() => true);
    world.net.run(outageMs);
    unblock();
    world.net.run(10);
    assert.ok(
      world.net.runUntil(() => alice.path() === "direct" && bob.path() === "direct", 8_000),
      `${outageMs} ms`,
    );
  }
});

test("a client whose public address changes is found again, and the conversation goes on", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  alice.send("bob", "m 0");
  world.net.run(3_000);
  alice.nat!.readdress("203.0.113.77");
  bob.send("alice", "still there?");
  alice.send("bob", "m 1");
  world.net.run(5_000);
  assert.deepEqual(texts(bob), ["m 0", "m 1"]);
  assert.deepEqual(texts(alice), ["still there?"]);
  assert.equal(bob.path(), "direct");
  assert.ok(bob.events("path").at(-1)!.address.startsWith("203.0.113.77:"));
});

test("the clock jumps by an hour: what is in flight still arrives, and the conversation goes on", () => {
  for (const nat of ["EIM+APDF random", "APDM+APDF random"]) {
    const world = createWorld();
    const [alice, bob] = pair(world, { nat }, { nat });
    alice.send("bob", "m 0");
    world.net.run(3_000);
    alice.send("bob", "m 1");
    alice.jump(3_600_000);
    world.net.run(5_000);
    for (let i = 2; i < 5; i++) {
      alice.send("bob", `m ${i}`);
      bob.send("alice", `m ${i}`);
      if (i === 3) bob.jump(3_600_000);
      world.net.run(5_000);
    }
    assert.deepEqual(texts(bob), numbered(5));
    assert.deepEqual(texts(alice), numbered(5).slice(2));
    assert.ok([alice, bob].every((player) => player.events("sent").every(({ ok }) => ok)));
  }
});

test("a clock that jumps while a probe is on its way says nothing about the path", () => {
  for (const jumpMs of [20_000, 3_600_000]) {
    const world = createWorld({ seed: 7 });
    const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
    alice.send("bob", "one");
    world.net.run(2_000);
    alice.send("bob", "two");
    world.net.run(1_000);
    let isProbing = false;
    const untap = world.net.tap(({ host, data }) => void (isProbing ||= host === "alice" && data[1] === 103));
    world.net.runUntil(() => isProbing, 2_000);
    untap();
    alice.jump(jumpMs);
    world.net.run(1_000);
    alice.send("bob", "three");
    world.net.run(3_000);
    let isLost = false;
    world.net.block(({ host, data }) => !isLost && host === "alice" && data[1] === 100 && (isLost = true));
    alice.send("bob", "four");
    world.net.run(3_000);
    assert.ok(alice.events("sent").at(-1)!.ms < 1_000, `${alice.events("sent").at(-1)!.ms} ms after ${jumpMs}`);
    assert.deepEqual(texts(bob), ["one", "two", "three", "four"]);
  }
});

test("the server hears from us every 10 s while we talk directly, every 20 s when nobody has for five minutes", () => {
  const world = createWorld();
  const [alice] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  alice.send("bob", "hi");
  world.net.run(5_000);
  let keepalives = 0;
  world.net.tap(({ host, data }) =>
    void (keepalives += Number(host === "alice" && decode(data)?.type === "KEEPALIVE"))
  );
  world.net.run(200_000);
  assert.ok(keepalives >= 16 && keepalives <= 26, `${keepalives} in 200 s`);
  world.net.run(200_000);
  keepalives = 0;
  world.net.run(200_000);
  assert.ok(keepalives >= 8 && keepalives <= 13, `${keepalives} in 200 s`);
});

// ---------------------------------------------------------------------------------------------------- messages in doubt

test("the path dies under a long message: what has arrived is not sent again", () => {
  const seeds = many(20, 4);
  let sent = 0;
  for (let seed = 0; seed < seeds; seed++) {
    const world = createWorld({ seed });
    const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
    alice.send("bob", "hi");
    world.net.run(2_000);
    world.net.conditions = { loss: 0.2 };
    world.net.tap(({ host, bytes }) => void (sent += Number(host === "alice" && bytes > 700)));
    alice.send("bob", "x".repeat(60_000));
    world.net.run(100);
    world.net.block(({ from, to }) => ![from, to].some((end) => end.startsWith("192.0.2.1")));
    world.net.run(20_000);
    assert.equal(texts(bob).length, 2);
  }
  assert.ok(sent < seeds * 275, `${sent / seeds} datagrams for 75 parts`);
});

test("the last part, of whose loss no acknowledgement would tell, is sent again after two round trips", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  for (let i = 0; i < 10; i++) {
    alice.send("bob", `m ${i}`);
    world.net.run(1_000);
  }
  let isLost = false;
  world.net.block(({ host, data }) => !isLost && host === "alice" && data[1] === 100 && (isLost = true));
  const start = world.net.now();
  alice.send("bob", "lost once");
  world.net.run(1_000);
  const { at } = bob.events("message").at(-1)!;
  assert.ok(isLost && at - start <= 2 * D + D / 2 + 5, `${at - start} ms`);
});

test("a message that was there behind one that was given up is shown, and no other is called sent", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { direct: false }, {});
  alice.send("bob", "zero");
  world.net.run(2_000);
  const unblock = world.net.block(({ bytes, host }) => bytes > 500 && host === "alice");
  alice.send("bob", "one " + "x".repeat(700));
  world.net.run(100);
  alice.send("bob", "two");
  world.net.run(20_000);
  unblock();
  alice.send("bob", "three");
  world.net.run(5_000);
  assert.deepEqual(alice.events("sent").map(({ ok }) => ok), [true, false, true, true]);
  assert.deepEqual(texts(bob), ["zero", "two", "three"]);
});

test("a message is not called sent because the peer says once more that it has nothing yet", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { direct: false }, { direct: false });
  alice.command({ command: "ping", peer: "bob", count: 1 }); // opens the session, with no message inside
  let answers = 0, parts = 0;
  world.net.block(({ node, host, to, data }) =>
    node === "core" &&
    (host === "server"
      ? to === alice.host.addresses[0] + to.slice(to.lastIndexOf(":")) && decode(data)?.type === "RELAYED" &&
        answers++ === 0
      : host === "alice" && data.length > 700 && parts++ === 0)
  );
  alice.send("bob", "0".repeat(700));
  world.net.run(10_000);
  assert.ok(answers > 2 && parts > 1, `${answers} answers, ${parts} parts`);
  assert.deepEqual(texts(bob), ["0".repeat(700)]);
});

// ---------------------------------------------------------------------------------------------------- the server

test("the server is restarted: direct conversations go on, everybody is back 2 s after a keepalive at the latest", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  alice.send("bob", "m 0");
  world.net.run(3_000);
  world.restartServer();
  alice.send("bob", "m 1");
  world.net.run(1_000);
  assert.deepEqual(texts(bob), ["m 0", "m 1"]);
  world.net.run(26_000);
  for (const player of [alice, bob]) assert.equal(player.events("reconnected").length, 1);
  alice.command({ command: "getu", prefix: "" });
  world.net.run(1_000);
  assert.deepEqual(alice.events("users")[0]!.users.map(({ name }) => name), ["alice", "bob"]);
  assert.equal(alice.events("path").length, 1);
});

test("the server is restarted under a conversation on the relay: no message is lost", () => {
  for (let seed = 0; seed < many(20, 4); seed++) {
    const world = createWorld({ seed });
    const [alice, bob] = pair(world, { nat: "APDM+APDF random" }, { nat: "APDM+APDF random" });
    for (let i = 0; i < 100; i++) {
      if (i === 20) world.restartServer();
      if (i === 60) world.server.stop();
      if (i === 75) world.restartServer();
      alice.send("bob", `m ${i}`);
      bob.send("alice", `m ${i}`);
      world.net.run(200);
    }
    world.net.run(15_000);
    assert.deepEqual(texts(bob), numbered(100), `seed ${seed}`);
    assert.deepEqual(texts(alice), numbered(100), `seed ${seed}`);
  }
});

test("a client whose server does not answer says so after ten seconds, and is idle in between", () => {
  const world = createWorld();
  world.server.stop();
  const alice = join(world, "alice"), started = world.net.now();
  world.net.run(30_000);
  assert.deepEqual(alice.events("error").map(({ code, at }) => [code, at - started]), [["unreachable", 10_000]]);
});

test("a server whose answers to keepalives alone are lost is not called gone while it passes messages on", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { direct: false }, { direct: false });
  world.net.block(({ host, data }) => host === "server" && decode(data)?.type === "ALIVE");
  for (let i = 0; i < 120; i++) {
    alice.send("bob", `a ${i}`);
    bob.send("alice", `b ${i}`);
    world.net.run(500);
  }
  for (const player of [alice, bob]) assert.equal(player.events("reconnecting").length, 0);
  assert.deepEqual(texts(bob), numbered(120, "a "));
});

test("a lost WELCOME and a minute without a network, or another mapping: in again within seconds", () => {
  for (const outageMs of [30_000, 65_000, 120_000]) {
    const world = createWorld();
    const [alice] = pair(world, { nat: "EIM+APDF random" }, {});
    world.restartServer();
    let until = 0;
    world.net.tap(({ data }) => {
      if (until === 0 && decode(data)?.type === "WELCOME") until = world.net.now() + outageMs;
      if (world.net.now() < until) return "drop";
    });
    assert.ok(world.net.runUntil(() => until > 0, 60_000));
    world.net.run(outageMs);
    assert.ok(world.net.runUntil(() => alice.events("reconnected").length > 0, 5_000), `${outageMs} ms`);
  }
  const world = createWorld();
  let alice: Player | null = null, isLost = false;
  world.net.tap(({ data }) => {
    if (isLost || decode(data)?.type !== "WELCOME") return;
    isLost = true;
    alice!.nat!.flush();
    return "drop";
  });
  alice = join(world, "alice", { nat: "EIM+APDF random", patient: true });
  assert.ok(world.net.runUntil(() => alice!.events("login").length > 0, 5_000), "its NAT has forgotten");
});

test("a login whose WELCOME was lost is reached at once where it asked again from", () => {
  const world = createWorld();
  const bob = join(world, "bob");
  login(world, bob);
  let alice: Player | null = null, welcomes = 0, start = 0;
  world.net.tap(({ data }) => {
    if (decode(data)?.type !== "WELCOME" || ++welcomes > 2) return;
    if (welcomes === 1) {
      alice!.nat!.flush();
      return "drop";
    }
    start = world.net.now(); // she does not know yet that she is in, and has sent nothing else from there
    bob.send("alice", "welcome");
  });
  alice = join(world, "alice", { nat: "EIM+APDF random" });
  login(world, alice);
  world.net.run(1_000);
  assert.deepEqual(alice.events("message").map(({ at, text }) => [at - start, text]), [[R, "welcome"]]);
});

test("a first message while the server is just back and the other one is not: it waits for him", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  const unblock = world.net.block(({ host, to }) => host === "bob" || to.startsWith(bob.nat!.addresses[0]!));
  world.restartServer();
  world.net.runUntil(() => alice.events("reconnected").length > 0, 60_000);
  alice.send("bob", "are you back?");
  world.net.run(3_000);
  unblock();
  world.net.run(11_000);
  assert.deepEqual(alice.events("sent").map(({ ok }) => ok), [true]);
  assert.deepEqual(texts(bob), ["are you back?"]);
});

test("one side alone logs in again, as when the server was out of its reach: the direct path goes on", () => {
  for (const talk of [false, true]) {
    const world = createWorld();
    const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
    alice.send("bob", "hi");
    world.net.run(2_000);
    const unblock = world.net.block(({ host, to }) => host === "alice" && to.startsWith("192.0.2.1"));
    world.net.run(40_000);
    unblock();
    for (let i = 0; i < 60; i++) {
      if (talk) alice.send("bob", `a ${i}`);
      if (talk && i % 7 === 0) bob.send("alice", `b ${i}`);
      world.net.run(1_000);
    }
    assert.equal(alice.events("reconnected").length, 1);
    for (const player of [alice, bob]) {
      assert.deepEqual(player.events("path").map(({ path }) => path), ["direct"]);
      assert.ok(player.events("sent").every(({ ok }) => ok));
    }
    assert.equal(texts(bob).length, talk ? 61 : 1);
    assert.equal(texts(alice).length, talk ? 9 : 0);
  }
});

const USERS = many(10_000, 600);
test(`${USERS} users list completely, each datagram at most 1,200 bytes, also at 5 % loss`, () => {
  for (const loss of [0, 0.05]) {
    const world = createWorld();
    const names = Array.from({ length: USERS - 1 }, (_, i) => `user-${i}`);
    crowd(world, names);
    const alice = join(world, "alice");
    login(world, alice);
    world.net.conditions = { loss };
    let largest = 0;
    world.net.trace = ({ bytes }) => largest = Math.max(largest, bytes);
    alice.command({ command: "getu", prefix: "" });
    alice.command({ command: "getu", prefix: "user-99" });
    assert.ok(world.net.runUntil(() => alice.events("users").length === 2, 30_000));
    const [all, some] = alice.events("users").map(({ users }) => users.map(({ name }) => name));
    assert.deepEqual(all, ["alice", ...names].sort());
    assert.deepEqual(some, all!.filter((name) => name.startsWith("user-99")));
    assert.ok(largest <= 1_200);
  }
});

// ---------------------------------------------------------------------------------------------------- a peer that is started again

test("a peer that is started again under its name gets what comes after, and nothing twice", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  alice.send("bob", "for the first");
  world.net.run(3_000);
  bob.command({ command: "exit" });
  world.net.run(1_000);
  const again = join(world, "bob", { host: bob.host, nat: bob.nat });
  login(world, again);
  alice.send("bob", "for the second");
  world.net.run(5_000);
  assert.deepEqual(texts(again), ["for the second"]);
  assert.equal(alice.path(), "direct");
  assert.deepEqual(alice.events("error").map(({ code }) => code), ["key-changed"]);
  again.send("alice", "thanks");
  world.net.run(2_000);
  assert.deepEqual(texts(alice), ["thanks"]);
});

test("a peer that is started again gets at once what its former run had, and had not shown", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { direct: false }, { direct: false });
  alice.send("bob", "first");
  world.net.run(1_000);
  const unblock = world.net.block(({ host, data }) => host === "alice" && data.length > 700);
  alice.send("bob", "0".repeat(700));
  for (const text of numbered(20)) alice.send("bob", text);
  world.net.run(1_000);
  bob.command({ command: "exit" });
  world.net.run(1_000);
  unblock();
  const again = join(world, "bob", { host: bob.host, direct: false });
  login(world, again);
  const start = world.net.now();
  world.net.run(10_000);
  assert.deepEqual(texts(again), ["0".repeat(700), ...numbered(20)]);
  assert.ok(again.events("message").at(-1)!.at - start < 2_000, `${again.events("message").at(-1)!.at - start} ms`);
});

test("a peer that is started again in the middle of a message gets it whole", () => {
  for (let passing = 1; passing < 5; passing++) {
    const world = createWorld();
    const [alice, bob] = pair(world, { direct: false }, { direct: false });
    alice.send("bob", "first");
    world.net.run(1_000);
    let passed = 0;
    const unblock = world.net.block(({ node, host, data }) =>
      node === "core" && host === "alice" && data.length > 800 && ++passed > passing
    );
    const text = "0123456789".repeat(420);
    alice.send("bob", text);
    world.net.run(1_000);
    bob.command({ command: "exit" });
    world.net.run(1_000);
    const again = join(world, "bob", { host: bob.host, direct: false });
    login(world, again);
    unblock();
    alice.send("bob", "last");
    world.net.run(10_000);
    assert.deepEqual(texts(again), [text, "last"], `${passing} parts went to the former run`);
  }
});

// ---------------------------------------------------------------------------------------------------- names

test("a second login under a name is refused while the first is alive", () => {
  const world = createWorld();
  const [alice] = pair(world, {}, {});
  const thief = join(world, "alice", {});
  world.net.run(3_000);
  assert.deepEqual(thief.events("error").map(({ code, fatal }) => [code, fatal]), [["name-taken", true]]);
  assert.equal(alice.events("reconnecting").length, 0);
  alice.process.stop();
  world.net.run(61_000);
  const heir = join(world, "alice", {});
  login(world, heir);
});

test("a clean logout frees the name at once; a kept key holds it for five minutes after it has vanished", () => {
  const world = createWorld();
  const keys = world.keys();
  const alice = join(world, "alice", { keys, keepName: true });
  login(world, alice);
  alice.process.stop();
  world.net.run(62_000);
  const thief = join(world, "alice", {});
  world.net.run(2_000);
  assert.deepEqual(thief.events("error").map(({ code }) => code), ["name-taken"]);
  const back = join(world, "alice", { keys, keepName: true });
  login(world, back);
  back.command({ command: "exit" });
  world.net.run(1_000);
  login(world, join(world, "alice", {}));
});

test("who lost his name for minutes gets it back as soon as it is free", () => {
  const world = createWorld();
  const alice = join(world, "alice");
  login(world, alice);
  const [home] = alice.host.addresses;
  const unblock = world.net.block(({ from, to }) => [from, to].some((end) => hostOf(end) === home));
  world.net.run(65_000);
  const thief = join(world, "alice", { address: "198.51.100.99" });
  login(world, thief);
  unblock();
  world.net.run(600_000);
  assert.equal(alice.events("reconnected").length, 0);
  thief.command({ command: "exit" });
  world.net.run(30_000);
  assert.equal(alice.events("reconnected").length, 1);
});

// ---------------------------------------------------------------------------------------------------- everything at once

const MIXTURES = many(200, 10);
test(`${MIXTURES} seeds of loss, silence, restarts, forgetful NATs and clocks that jump: what is called sent has come, once and in order`, () => {
  const names = ["alice", "bob"] as const, steps = 40;
  const kinds = ["EIM+APDF random", "EIM+EIF preserving", "APDM+APDF random", "APDM+APDF sequential", "EIM+ADF random"];
  for (let seed = 0; seed < MIXTURES; seed++) {
    const next = random(`everything ${seed}`), world = createWorld({ seed });
    const pick = <T>(values: readonly T[]) => values[Math.floor(next() * values.length)]!;
    const direct = next() < 0.7, hasJumped = [false, false], said: [Player, string][] = [];
    const keys = names.map(() => world.keys());
    /** Of each of the two, one process after the other. */
    const runs = names.map((
      name,
      i,
    ) => [join(world, name, { nat: pick(kinds), direct, keys: keys[i]!, patient: true })]);
    login(world, ...runs.flat());
    const say = (who: number, length: number) => {
      const player = runs[who]!.at(-1)!, text = `${said.length} ${"x".repeat(length)}`;
      said.push([player, text]);
      player.send(names[1 - who]!, text);
    };
    const acts: (() => void)[][] = [0, 1].map((who) => {
      const now = () => runs[who]!.at(-1)!;
      const restart = () => {
        if (hasJumped[who]) return; // a new process would not know of it, and log in with an older clock
        if (next() < 0.5) now().command({ command: "exit" });
        world.net.run(next() * 300);
        const { host, nat } = now();
        now().process.stop();
        runs[who]!.push(join(world, names[who]!, { host, nat, direct, keys: keys[who]!, patient: true }));
      };
      return [
        ...Array<() => void>(5).fill(() => {
          for (let i = 0; i < 3; i++) say(who, next() < 0.2 ? next() * 6_000 : next() * 50);
        }),
        () => now().command({ command: "ping", peer: names[1 - who]!, count: 1 }),
        () =>
          world.net.conditions = {
            loss: pick([0, 0, 0.05, 0.3, 0.6]),
            duplicate: pick([0, 0.3]),
            reorder: pick([0, 0.3]),
          },
        () => now().nat!.flush(),
        () => world.restartServer(),
        () => world.net.after(next() * 6_000, world.net.block(({ host }) => host === names[who])),
        restart,
        () => {
          hasJumped[who] = true;
          now().jump(pick([1_000, 60_000, 3_600_000]));
        },
      ];
    });
    for (let i = 0; i < steps; i++) {
      pick(acts[pick([0, 1])]!)();
      world.net.run(next() < 0.3 ? next() * 8_000 : next() * 300);
    }
    world.net.conditions = {};
    world.net.run(60_000);
    for (const who of [0, 1]) say(who, 0);
    world.net.run(20_000);
    for (const run of runs.flat()) {
      const numbers = texts(run).map((text) => Number(text.split(" ")[0]));
      assert.deepEqual(
        numbers,
        [...new Set(numbers)].sort((a, b) => a - b),
        `seed ${seed}: ${run.name} got ${numbers}`,
      );
      const own = said.filter(([player]) => player === run), outcomes = run.events("sent");
      const came = own.filter(([, text]) => runs.flat().some((other) => texts(other).includes(text)));
      const sent = outcomes.filter(({ ok }) => ok).length;
      assert.ok(sent <= came.length, `seed ${seed}: ${sent} of ${run.name} are called sent, ${came.length} came whole`);
      if (runs.some((line) => line.at(-1) === run)) {
        assert.equal(outcomes.length, own.length, `seed ${seed}: undecided`);
      }
    }
    for (const [who, line] of runs.entries()) {
      assert.equal(texts(line.at(-1)!).at(-1), `${said.length - 1 - who} `, `seed ${seed}: not back`);
    }
  }
});

/** Half of them on the relay. */
const CLIENTS = many(1_000, 12);
test(
  `${CLIENTS} clients, half of them on the relay, the server restarted every 10 s: nothing lost, nothing twice`,
  LONG,
  () => {
    const started = performance.now();
    const world = createWorld({ seed: 15 });
    const couples = Array.from({ length: CLIENTS / 2 }, (_, i) => {
      const options = { nat: i % 2 === 0 ? "APDM+APDF random" : "EIM+APDF random" };
      return [join(world, `a${i}`, options), join(world, `b${i}`, options)] as const;
    });
    login(world, ...couples.flat());
    world.net.run(1_000);
    const next = random("talk");
    const sent = couples.map(() => [0, 0]);
    const INTERVAL_MS = 4_000;
    const end = world.net.now() + 60_000;
    couples.forEach((couple, i) =>
      couple.forEach((player, side) => {
        const speak = () => {
          if (world.net.now() >= end) return;
          player.send(couple[1 - side]!.name, `m ${sent[i]![side]!++}`);
          world.net.after((0.5 + next()) * INTERVAL_MS, speak);
        };
        world.net.after(next() * INTERVAL_MS, speak);
      })
    );
    for (let restart = 0; restart < 6; restart++) {
      world.net.run(9_000);
      world.server.stop();
      world.net.run(1_000);
      world.restartServer();
    }
    world.net.run(30_000);
    let count = 0, lucky = 0; // a guess at a random port hits, once in some ten thousand
    couples.forEach((couple, i) =>
      couple.forEach((player, side) => {
        const expected = numbered(sent[i]![1 - side]!, "m ");
        count += expected.length;
        assert.deepEqual(texts(player), expected, player.name);
        const directly = player.events("message").filter(({ path }) => path === "direct").length;
        if (i % 2 === 0) lucky += Number(directly > 0);
        else assert.ok(directly > expected.length / 2, `${player.name}: ${directly} directly`);
      })
    );
    assert.ok(lucky <= CLIENTS / 100, `${lucky} of those who cannot have a path have one`);
    console.log(
      `${CLIENTS} clients, ${count} messages, 6 restarts: ${((performance.now() - started) / 1_000).toFixed(1)} s`,
    );
  },
);
