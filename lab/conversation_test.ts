/**
 * Two who talk, when nothing is in the way but NATs and a bad line: which path they get and when, and that messages
 * arrive once and in order.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { linux, NATS, random } from "./network.ts";
import { createWorld, D, DELAY_MS, join, login, R } from "./scenario.ts";
import { many, numbered, pair, texts } from "./testing.ts";

/** Client to server to client, all equally far away. */
const HOP = R;

// ---------------------------------------------------------------------------------------------------- NAT x NAT

const KINDS = ["public", "EIM+EIF preserving", "EIM+ADF random", "EIM+APDF random", "APDM+APDF random"];
/** Two symmetric NATs with random ports: nothing passes. */
const passes = (one: string, other: string) => !(one.startsWith("APDM") && other.startsWith("APDM"));
/** A plain punch passes, unless a symmetric NAT meets one that filters by port: that takes a spray (traversal_test.ts). */
const isPlain = (one: string, other: string) =>
  ![one, other].some((kind) => kind.startsWith("APDM")) ||
  [one, other].some((kind) => kind === "public" || kind.startsWith("EIM+EIF") || kind.startsWith("EIM+ADF"));

for (const one of KINDS) {
  for (const other of KINDS) {
    test(`${one} x ${other}: ${passes(one, other) ? "direct" : "over the relay"}, and the message after one hop`, () => {
      const world = createWorld();
      const [alice, bob] = pair(world, { nat: one === "public" ? null : one }, {
        nat: other === "public" ? null : other,
      });
      const start = world.net.now();
      alice.send("bob", "hi");
      world.net.run(12_000);
      const message = bob.events("message")[0]!;
      assert.equal(message.at - start, HOP);
      assert.equal(message.path, "relay");
      for (const player of [alice, bob]) assert.equal(player.path(), passes(one, other) ? "direct" : "relay");
      if (isPlain(one, other)) {
        // Of a symmetric NAT the other side learns the port from its first packet: D/2 later than from the server.
        const limit = R + D + (one.startsWith("APDM") || other.startsWith("APDM") ? D : 0);
        for (const player of [alice, bob]) assert.ok(player.events("path")[0]!.at - start <= limit);
      }
      bob.send("alice", "ho");
      world.net.run(1_000);
      assert.deepEqual(texts(alice), ["ho"]);
      assert.equal(alice.events("message")[0]!.path, passes(one, other) ? "direct" : "relay");
    });
  }
}

// ---------------------------------------------------------------------------------------------------- what it costs

test("login takes 2 R, the first message one hop, the direct path R + D, the next message D/2", () => {
  const world = createWorld();
  const start = world.net.now();
  const alice = join(world, "alice", { nat: "EIM+APDF random" }), bob = join(world, "bob", { nat: "EIM+APDF random" });
  login(world, alice, bob);
  assert.equal(world.net.now() - start, 2 * R);
  world.net.run(500);
  const called = world.net.now();
  alice.send("bob", "one");
  world.net.run(1_000);
  assert.equal(bob.events("message")[0]!.at - called, HOP);
  for (const player of [alice, bob]) {
    const path = player.events("path");
    assert.equal(path.length, 1);
    assert.equal(path[0]!.at - called, R + D);
    assert.equal(path[0]!.rttMs, D);
  }
  const next = world.net.now();
  alice.send("bob", "two");
  world.net.run(1_000);
  assert.equal(bob.events("message")[1]!.at - next, D / 2);
  assert.deepEqual(alice.events("sent").map(({ path, ms }) => [path, ms]), [["relay", 2 * R], ["direct", D]]);
});

test("a sender that has never seen the receiver in a list pays one R more", () => {
  const world = createWorld();
  const crowd = Array.from({ length: 30 }, (_, i) => join(world, `m${i}`));
  login(world, ...crowd);
  const alice = join(world, "alice", { nat: "EIM+APDF random" });
  login(world, alice);
  const zoe = join(world, "zoe", { nat: "EIM+APDF random" });
  login(world, zoe);
  world.net.run(1_000);
  const start = world.net.now();
  alice.send("zoe", "hi");
  world.net.run(2_000);
  assert.equal(zoe.events("message")[0]!.at - start, R + HOP);
  assert.equal(alice.path(), "direct");
});

test("the nearer peer waits, so that both punches cross in flight: even through Linux with an open INPUT chain", () => {
  for (const [near, far] of [[5, 60], [60, 5], [1, 140]] as const) {
    const world = createWorld();
    const place = (name: string, delayMs: number) =>
      world.net.nat({ name, address: `203.0.113.${delayMs}`, delayMs, ...linux("accept") });
    const [alice, bob] = pair(world, { nat: place("a", near) }, { nat: place("b", far) });
    alice.send("bob", "hi");
    world.net.run(1_400);
    assert.equal(alice.path(), "direct");
    assert.equal(bob.path(), "direct");
  }
});

// ---------------------------------------------------------------------------------------------------- delivery

test("whichever datagram of the first second of a call is lost, the direct path comes within R + D + 1 s", () => {
  for (const kind of ["EIM+APDF random", "APDM+APDF sequential"]) {
    for (let lost = 0, count = Infinity; lost < count; lost++) {
      const world = createWorld();
      const [alice, bob] = pair(world, { nat: kind }, { nat: "EIM+APDF random" });
      const start = world.net.now();
      let seen = 0;
      const unblock = world.net.block(({ node }) => node === "core" && seen++ === lost);
      alice.send("bob", "hi");
      world.net.run(1_000);
      unblock();
      if (lost === 0) count = Math.min(seen, 40);
      world.net.run(4_000);
      assert.deepEqual(texts(bob), ["hi"]);
      for (const player of [alice, bob]) {
        const at = player.events("path")[0]?.at ?? Infinity;
        assert.ok(at - start <= R + D + 1_000, `${kind}, ${player.name} without datagram ${lost}: ${at - start} ms`);
      }
    }
  }
});

const BAD_LINES = many(500, 12);
test(`${BAD_LINES} seeds at 30 % loss, duplication and reordering: 200 messages each way, once and in order`, () => {
  const count = 200;
  for (let seed = 0; seed < BAD_LINES; seed++) {
    const world = createWorld({ seed });
    const kinds = ["EIM+APDF random", "EIM+EIF preserving", "APDM+APDF random"];
    const [alice, bob] = pair(world, { nat: kinds[seed % 3]! }, { nat: kinds[(seed >> 1) % 3]! });
    world.net.conditions = { loss: 0.3, duplicate: 0.3, reorder: 0.3 };
    const next = random(`talk ${seed}`);
    for (let i = 0; i < count; i++) {
      world.net.after(next() * 5_000, () => {});
      alice.send("bob", `a ${i}`);
      bob.send("alice", `b ${i}`);
      if (i % 20 === 19) world.net.run(next() * 500);
    }
    const done = world.net.runUntil(
      () => [alice, bob].every((player) => player.events("sent").length === count),
      300_000,
    );
    assert.ok(done, `seed ${seed}: not all of them are decided`);
    assert.deepEqual(texts(bob), numbered(count, "a "), `seed ${seed}`);
    assert.deepEqual(texts(alice), numbered(count, "b "), `seed ${seed}`);
    assert.ok([alice, bob].every((player) => player.events("sent").every(({ ok }) => ok)), `seed ${seed}`);
  }
});

test("a message of 64 KiB arrives whole, over the relay and directly, at 5 % loss too", () => {
  for (const nat of ["EIM+APDF random", "APDM+APDF random"]) {
    const world = createWorld();
    const [alice, bob] = pair(world, { nat }, { nat });
    const text = "0123456789abcdef".repeat(4096);
    alice.send("bob", text);
    world.net.run(10_000);
    world.net.conditions = { loss: 0.05 };
    alice.send("bob", text);
    world.net.run(20_000);
    assert.deepEqual(texts(bob).map((text) => text.length), [65_536, 65_536]);
    assert.ok(texts(bob).every((received) => received === text));
    alice.send("bob", text + "x");
    alice.send("bob", "");
    assert.deepEqual(alice.events("sent").slice(2).map((sent) => !sent.ok && sent.reason), ["too-long", "empty"]);
  }
});

test("id and path are the same on both sides", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  for (let i = 0; i < 20; i++) {
    alice.send("bob", `${i}`);
    world.net.run(17);
  }
  world.net.run(2_000);
  const told = (entries: { id: string; path: string }[]) => entries.map(({ id, path }) => `${id} ${path}`).sort();
  assert.deepEqual(told(alice.events("sent")), told(bob.events("message")));
  assert.equal(new Set(told(bob.events("message"))).size, 20);
});

test("nobody of that name: at once, with a reason; gone: offline; no answer: Send Failure! after 15 s", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  alice.send("nobody", "hi");
  world.net.run(R);
  assert.deepEqual(alice.events("sent").map((sent) => sent.ok || sent.reason), ["unknown"]);

  alice.send("bob", "hi");
  world.net.run(5_000);
  const start = world.net.now();
  bob.process.stop();
  alice.send("bob", "are you there?");
  world.net.run(20_000);
  const late = alice.events("sent").at(-1)!;
  assert.equal(late.ok || late.reason, "timeout");
  assert.ok(Math.abs(late.at - start - 15_000) < 10);

  world.net.run(60_000);
  alice.send("bob", "and now?");
  world.net.run(3_000);
  const gone = alice.events("sent").at(-1)!;
  assert.equal(gone.ok || gone.reason, "offline");
});

test("sending to oneself works", () => {
  const world = createWorld();
  const [alice] = pair(world, { nat: "EIM+APDF random" }, {});
  for (const text of ["note", "another"]) {
    alice.send("alice", text);
    world.net.run(1_000);
  }
  assert.deepEqual(texts(alice, "alice"), ["note", "another"]);
  assert.deepEqual(alice.events("sent").map(({ ok, path }) => [ok, path]), [[true, "relay"], [true, "relay"]]);
});

test("both call at once: both messages arrive after one hop, and one session goes on", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random" }, { nat: "EIM+APDF random" });
  const start = world.net.now();
  alice.send("bob", "a 0");
  bob.send("alice", "b 0");
  world.net.run(3_000);
  for (const player of [alice, bob]) {
    assert.equal(player.events("message")[0]!.at - start, HOP);
    assert.equal(player.path(), "direct");
    player.send(player === alice ? "bob" : "alice", "next");
  }
  world.net.run(1_000);
  assert.deepEqual(texts(alice), ["b 0", "next"]);
  assert.deepEqual(texts(bob), ["a 0", "next"]);
});

test("two who do not punch write four messages a second each way: every one arrives after one hop", () => {
  const world = createWorld();
  const alice = join(world, "alice", { direct: false }), bob = join(world, "bob", { direct: false });
  login(world, alice, bob);
  world.net.run(500);
  const sentAt: number[] = [];
  for (let i = 0; i < 60; i++) {
    sentAt.push(world.net.now());
    alice.send("bob", `m ${i}`);
    bob.send("alice", `m ${i}`);
    world.net.run(250);
  }
  world.net.run(5_000);
  for (const player of [alice, bob]) {
    assert.deepEqual(texts(player), numbered(60, "m "));
    const late = player.events("message").filter(({ at }, i) => at - sentAt[i]! > R);
    assert.deepEqual(late.map(({ text, at }) => [text, at - sentAt[Number(text.slice(2))]!]), []);
  }
});

// ---------------------------------------------------------------------------------------------------- same site

test("two behind one NAT meet on their LAN, whether it hairpins or not", () => {
  for (const hairpin of [false, true]) {
    const world = createWorld();
    const nat = world.net.nat({
      name: "home",
      address: "203.0.113.9",
      delayMs: DELAY_MS,
      ...NATS["EIM+APDF random"]!,
      hairpin,
    });
    const [alice, bob] = pair(world, { nat, address: "192.168.1.2" }, { nat, address: "192.168.1.3" });
    alice.send("bob", "hi");
    world.net.run(2_000);
    for (const player of [alice, bob]) assert.equal(player.path(), "lan");
    assert.ok(alice.events("path").at(-1)!.address.startsWith("192.168.1.3:"));
  }
});

test("LAN addresses are not told to anybody outside", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { nat: "EIM+APDF random", address: "192.168.7.7" }, { nat: "EIM+APDF random" });
  const seen: string[] = [];
  world.net.trace = ({ fate, host, to }) => void (fate === "sent" && host === "bob" && seen.push(to));
  alice.send("bob", "hi");
  world.net.run(3_000);
  assert.ok(seen.length > 0 && seen.every((to) => !to.startsWith("192.168.")));
  assert.equal(bob.path(), "direct");
});

test("two behind one carrier NAT: by hairpin where it has one, else over the relay", () => {
  for (const hairpin of [false, true]) {
    const world = createWorld();
    const carrier = world.net.nat({
      name: "carrier",
      address: "203.0.113.8",
      delayMs: DELAY_MS,
      ...NATS["EIM+APDF random"]!,
      hairpin,
    });
    const home = (name: string, address: string) =>
      world.net.nat({ name, address, behind: carrier, ...NATS["EIM+APDF random"]! });
    const [alice, bob] = pair(world, { nat: home("a", "100.64.0.2"), address: "192.168.1.2" }, {
      nat: home("b", "100.64.0.3"),
      address: "192.168.1.2",
    });
    alice.send("bob", "hi");
    world.net.run(3_000);
    assert.deepEqual(texts(bob), ["hi"]);
    assert.equal(alice.path(), hairpin ? "direct" : "relay");
  }
});

test("two clients on one host use loopback", () => {
  const world = createWorld();
  const alice = join(world, "alice", { nat: "EIM+APDF random" });
  const bob = join(world, "bob", { host: alice.host, nat: alice.nat });
  login(world, alice, bob);
  alice.send("bob", "hi");
  world.net.run(2_000);
  assert.equal(alice.path(), "lan");
});

test("two clients on the server's own host use loopback", () => {
  const world = createWorld();
  const place = { host: world.serverHost, address: "192.168.3.3", servers: ["127.0.0.1:2280"] };
  const alice = join(world, "alice", place), bob = join(world, "bob", place);
  login(world, alice, bob);
  alice.send("bob", "hi");
  world.net.run(2_000);
  for (const player of [alice, bob]) assert.match(player.events("path").at(-1)!.address, /^127\.0\.0\.1:/);
});

test("IPv6 passes where IPv4 cannot", () => {
  const world = createWorld({ v6: true });
  const [alice, bob] = pair(world, { nat: "APDM+APDF random", v6: "2001:db8:a::1" }, {
    nat: "APDM+APDF random",
    v6: "2001:db8:b::1",
  });
  alice.send("bob", "hi");
  world.net.run(3_000);
  for (const player of [alice, bob]) assert.equal(player.path(), "direct");
  assert.ok(alice.events("path").at(-1)!.address.startsWith("[2001:db8:b::1]:"));
});
