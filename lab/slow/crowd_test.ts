/**
 * Limits that only a crowd reaches: 1,000 conversations, 10,000 names, thousands of datagrams a second.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { decode, type Endpoint, hostOf } from "../../protocol.ts";
import { enter, hand, like, memory, MIB, NO_BYTES, NO_ID, office, part, reasonOf } from "../hostile.ts";
import { rogueCrowd, village } from "../hostile.ts";
import { createWorld, crowd, join, login, type Player } from "../scenario.ts";
import { LONG, numbered, pair, texts } from "../testing.ts";

test(
  "calls from more names than a client keeps conversations: bounded, and friends old and new get through",
  LONG,
  () => {
    const { world, alice, bob } = village(13);
    const writer = join(world, "writer", { nat: "EIM+APDF random" }); // alice has never answered
    login(world, writer);
    world.net.run(500);
    writer.send("alice", "before");
    world.net.run(5_000);
    const before = memory();
    const crowd = rogueCrowd(world, numbered(1_100, "stranger-"), alice);
    for (const [i, each] of crowd.entries()) {
      each.open("alice", i < 50 ? { type: "P2PTRASH", probe: 1 } : part(0, "buy!"));
      world.net.run(25); // 50 a second are let through
    }
    world.net.run(3_000);
    alice.command({ command: "path", peer: null });
    const conversations = new Set(alice.events("path").map(({ peer }) => peer));
    console.log(`1,100 callers: ${conversations.size} conversations, ${((memory() - before) / MIB).toFixed(1)} MiB`);
    assert.ok(conversations.size >= 1_000 && conversations.size <= 1_001 + 2);
    const zed = join(world, "zed", { nat: "EIM+APDF random" });
    login(world, zed);
    world.net.run(1_000);
    bob.send("alice", "are you all right?");
    alice.send("bob", "who are they?");
    zed.send("alice", "let me in");
    alice.send("zed", "hello zed");
    world.net.run(20_000);
    assert.deepEqual(texts(alice, "bob").at(-1), "are you all right?");
    assert.deepEqual(texts(bob).at(-1), "who are they?");
    assert.deepEqual(texts(alice, "zed"), ["let me in"]);
    assert.deepEqual(texts(zed), ["hello zed"]);
    writer.send("alice", "after");
    world.net.run(20_000);
    assert.deepEqual(texts(alice, "writer"), ["before", "after"]);
  },
);

test(
  "peers write as fast as the server lets them: the victim's other conversation over the relay goes on",
  LONG,
  () => {
    const { world, carol, dave } = village(14);
    const crowd = rogueCrowd(world, ["mallory", "mallet", "malice"], carol);
    for (const each of crowd) each.open("carol", part(0, "x"));
    world.net.run(1_000);
    assert.ok(crowd.every((each) => each.isOpen()));
    const heard = texts(carol, "dave").length, told = texts(dave).length;
    const sentAt: number[] = [];
    let seq = 1;
    for (let ms = 0; ms < 2_800; ms += 10) {
      if (ms % 400 === 0) {
        sentAt.push(world.net.now());
        dave.send("carol", `amid ${ms}`);
        carol.send("dave", `amid ${ms}`);
      }
      for (let i = 0; i < 40; i++, seq++) {
        for (const each of crowd) each.relay(each.sealed(part(seq, "x", { base: seq })));
      }
      world.net.run(10);
    }
    world.net.run(20_000);
    const late = (player: Player, from: string, before: number) =>
      player.events("message").filter((message) => message.from === from).slice(before).map(({ at }, i) =>
        at - sentAt[i]!
      );
    const toCarol = late(carol, "dave", heard), toDave = late(dave, "carol", told);
    console.log(
      `amid 7,500 datagrams a second: to carol ${Math.max(...toCarol)} ms, to dave ${Math.max(...toDave)} ms`,
    );
    assert.equal(toCarol.length, sentAt.length);
    assert.equal(toDave.length, sentAt.length);
    assert.ok(Math.max(...toCarol, ...toDave) <= 2_000, "somebody waits for longer than 2 s");
    for (const player of [carol, dave]) assert.ok(player.events("sent").every(({ ok }) => ok));
  },
);

test(
  "a thousand who call five times a second each keep a user from nobody whom he knows, nor newcomers from him",
  LONG,
  () => {
    const world = createWorld({ seed: 17, server: { maxPerAddress: 5_000 } });
    const nat = "EIM+APDF random", names = numbered(5, "friend-").map((name) => name.replace(" ", "-"));
    const [alice, newcomer] = ["alice", "newcomer"].map((name) => join(world, name, { nat }));
    const keys = names.map(() => world.keys()); // of the friends, who come again with the same
    const before = names.map((name, i) => join(world, name, { nat, keys: keys[i]! }));
    login(world, alice!, ...before, newcomer!);
    for (const name of names) alice!.send(name, "hello");
    world.net.run(3_000);
    const crowd = rogueCrowd(world, numbered(1_000, "stranger-"), alice!);
    let heard = 0;
    world.net.tap(({ host, to, data }) => {
      if (host === "server" && hostOf(to) === alice!.nat!.addresses[0] && decode(data)?.type !== "ALIVE") heard++;
    });
    const flood = (ms: number) => {
      for (let t = 0; t < ms; t++) {
        for (let i = 0; i < 5; i++) {
          const each = crowd[(5 * t + i) % 1_000]!, { nonce } = each.users.get("alice")!;
          each.say(like("P2PTRANS", { to: "alice", nonce, call: 1, body: NO_BYTES }));
        }
        world.net.run(1);
      }
    };
    for (const friend of before) friend.command({ command: "exit" });
    flood(3_000);
    const friends = names.map((name, i) => join(world, name, { nat, keys: keys[i]! }));
    flood(1_000);
    heard = 0;
    for (const friend of friends) {
      friend.send("alice", "of a friend");
      flood(7);
    }
    alice!.send("newcomer", "of alice");
    flood(1_000);
    assert.ok(heard <= 100, `she hears ${heard} datagrams a second`);
    for (const sender of [...friends, alice!]) {
      const { ok, ms } = sender.events("sent").at(-1)!;
      assert.ok(ok && ms < 500, `${sender.name}: ${ok}, ${ms} ms`);
    }
    newcomer!.send("alice", "of one she has written to");
    flood(1_000);
    assert.equal(texts(alice!, "newcomer").at(-1), "of one she has written to");
    assert.equal(texts(alice!, names[0]).at(-1), "of a friend");
  },
);

test("limit: a name that is held is not freed by 10,000 names that come and go", LONG, () => {
  const { server, tools, come, now } = office();
  const alice = (from: Endpoint, at: number) =>
    enter(server, hand("alice", tools, { keepName: true }), { from, now: at }); // with other keys each time
  assert.ok(alice("100.64.1.1:1", now));
  server.wake(now + 60_000);
  const later = now + 61_000;
  assert.equal(alice("100.64.1.2:1", later), null);
  for (let i = 0; i < 10_001; i++) {
    const user = come(`user-${i}`, `100.${64 + (i % 50)}.2.1:1`, later + i)!;
    server.receive({ socket: 0, from: user.from, data: user.seal(like("LOGOUT", {})) }, later + i);
  }
  assert.equal(alice("100.64.1.3:1", later + 10_001), null);
});

test("limit: names that were here, the last 10,000 for an hour", LONG, () => {
  const { server, come, now } = office();
  const asker = come("asker", "100.127.0.1:1")!;
  const status = (name: string, at: number) =>
    reasonOf(asker.say(asker.seal(like("P2PTRANS", { to: name, nonce: NO_ID, call: 0, body: NO_BYTES })), at));
  for (let i = 0; i < 10_001; i++) {
    const user = come(`user-${i}`, `100.${64 + (i % 50)}.1.1:1`, now + i)!;
    user.say(user.seal(like("LOGOUT", {})), now + i);
  }
  const full = now + 10_001;
  assert.deepEqual([0, 1, 10_000].map((i) => status(`user-${i}`, full)), ["unknown", "offline", "offline"]);
  for (let at = full; at <= full + 3_610_000; at += 10_000) { // the asker stays
    asker.say(asker.seal(like("KEEPALIVE", { cookie: NO_ID, local: [] })), at);
    for (let due = server.wakeAt(); due <= at; due = server.wakeAt()) server.wake(due);
  }
  assert.equal(status("user-10000", full + 3_611_000), "unknown");
});

test("a peer that has evicted the conversation gets again what it had acknowledged behind a gap", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { direct: false }, { direct: false });
  const others = Array.from({ length: 1_000 }, (_, i) => `user-${i}`); // so many conversations a client keeps
  crowd(world, others);
  alice.send("bob", "first");
  world.net.run(1_000);
  for (const other of others.slice(1)) bob.send(other, "hi"); // nobody answers: they are given up after 15 s
  world.net.run(13_000);
  const unblock = world.net.block(({ host, data }) => host === "alice" && data.length > 700);
  for (const text of ["0".repeat(700), "1", "2"]) alice.send("bob", text);
  world.net.run(1_000);
  assert.deepEqual(texts(bob), ["first"]);
  bob.send(others[0]!, "hi"); // nothing waits for alice
  world.net.run(2_000);
  unblock();
  world.net.run(10_000);
  assert.deepEqual(texts(bob), ["first", "0".repeat(700), "1", "2"]);
  assert.ok(alice.events("sent").length === 4 && alice.events("sent").every(({ ok }) => ok));
});

test("a peer that has evicted the conversation and writes first is heard, and so is the answer", () => {
  const world = createWorld();
  const [alice, bob] = pair(world, { direct: false }, { direct: false });
  const others = Array.from({ length: 1_000 }, (_, i) => `user-${i}`);
  crowd(world, others);
  alice.send("bob", "before");
  world.net.run(1_000);
  for (const other of others) bob.send(other, "hi");
  world.net.run(20_000);
  bob.send("alice", "who was it?");
  world.net.run(2_000);
  alice.send("bob", "me");
  world.net.run(1_000);
  assert.deepEqual([texts(alice), texts(bob)], [["who was it?"], ["before", "me"]]);
});
