/**
 * How much of everything a server gives to one session, to one address and to all strangers; nobody else pays for it.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type Control, decode, type Endpoint, keysFrom, MAGIC } from "../protocol.ts";
import { enter, hand, like, NO_BYTES, NO_ID, office, reasonOf, sends, types } from "./hostile.ts";
import { LONG, numbered } from "./testing.ts";

test("limit: users at a time, and users at a time of one address", () => {
  const { server, come, now } = office({ maxUsers: 4, maxPerAddress: 2 });
  const one = come("one", "100.64.1.1:1")!;
  assert.ok(come("two", "100.64.1.2:1"));
  assert.equal(come("three", "100.64.1.3:1"), null); // the same /24
  assert.ok(come("three", "100.64.2.1:1"));
  assert.ok(come("four", "[2001:db8:1:1::1]:1"));
  assert.equal(come("five", "100.64.3.1:1"), null);
  assert.deepEqual(types(server.receive({ socket: 0, from: one.from, data: one.seal(like("LOGOUT", {})) }, now)), []);
  assert.ok(come("five", "100.64.1.4:1"));
  assert.equal(come("six", "[2001:db8:1:2::1]:1"), null);
});

test("limit: users at a time of one address, who have logged in elsewhere and moved; and moves of one of them", () => {
  const { server, tools, come, now } = office({ maxPerAddress: 2 });
  const move = (user: NonNullable<ReturnType<typeof come>>, to: Endpoint, at: number) => {
    const [challenge] = sends(user.say(user.seal(like("KEEPALIVE", { cookie: NO_ID, local: [] })), at, to))
      .filter((effect) => effect.to === to);
    const { cookie } = decode(challenge!.data) as Control & { type: "COOKIE" };
    return types(user.say(user.seal(like("KEEPALIVE", { cookie, local: [] })), at, to)).includes("ALIVE");
  };
  const keys = keysFrom(tools.bytes(32));
  const login = (name: string, from: Endpoint, clock: number) =>
    enter(server, hand(name, tools, { keys, clock }), { from, now });
  const users = [1, 2, 3].map((i) => login(`user-${i}`, `100.64.${i}.1:1`, 1)!);
  assert.deepEqual(users.map((user, i) => move(user, `100.64.9.${i}:1`, now)), [true, true, false]);
  assert.equal(come("late", "100.64.9.9:1"), null);
  assert.equal(login("user-3", "100.64.9.3:1", 2), null); // nor by logging in again there
  assert.ok(login("user-1", "100.64.9.7:1", 2)); // who is there may
  const moves = (at: number) =>
    Array.from({ length: 40 }, (_, i) => move(users[2]!, `100.65.${i}.1:${at % 1_000 + 1}`, at)).filter(Boolean).length;
  assert.equal(moves(now + 60_000), 10);
  assert.equal(moves(now + 61_001), 1);
  server.wake(now + 62_000);
});

test(
  "limit: logins of one address, 2,000 at once and 50 a second, wrong ones too; no other address suffers",
  LONG,
  () => {
    const { server, tools, come, now } = office({ maxPerAddress: 10 });
    const from = "100.64.1.1:1";
    const someone = hand("someone", tools);
    const [cookie] = sends(server.receive({ socket: 0, from, data: someone.hello() }, now));
    const attempt = someone.answer(cookie!.data)!.slice();
    attempt[attempt.length - 1]! ^= 1;
    for (let i = 0; i < 2_000; i++) assert.deepEqual(server.receive({ socket: 0, from, data: attempt }, now), []);
    assert.equal(come("late", "100.64.1.7:1"), null);
    assert.ok(come("other", "100.64.2.1:1"));
    assert.ok(come("late", "100.64.1.7:1", now + 100));
  },
);

test("limit: strangers altogether, 5,000 at once and 5,000 a second; with and without a cookie, and users, apart", () => {
  const { server, tools, come, now } = office();
  const user = come("user", "100.64.1.1:1")!;
  const alive = like("KEEPALIVE", { cookie: NO_ID, local: [] });
  const hello = hand("someone", tools).hello(), wrong = hello.slice();
  wrong.fill(1, 16, 24);
  const answered = (data: Uint8Array, count: number, at: number) => {
    let answers = 0;
    for (let i = 0; i < count; i++) {
      answers +=
        server.receive({ socket: 0, from: `100.${64 + (i >> 14)}.${(i >> 8) & 63}.${i & 255}:1`, data }, at).length;
    }
    return answers;
  };
  const later = now + 10_000;
  for (let i = 0; i < 6_000; i++) answered(Uint8Array.from([MAGIC, 7, ...new Uint8Array(40)]), 1, later); // too short to count
  for (const data of [hello, wrong]) assert.equal(answered(data, 6_000, later), 5_000);
  assert.deepEqual(types(user.say(user.seal(alive), later)), ["ALIVE"]);
  assert.equal(answered(user.seal(alive).with(2, 0xff), 100, later), 0); // nobody's token
  const borrowed = hello.slice();
  borrowed.set(user.seal(alive).subarray(2, 10), 2); // a user's token: no way around the limit
  assert.equal(answered(borrowed, 100, later), 0);
  for (const data of [hello, wrong]) assert.equal(answered(data, 6_000, later + 1_000), 5_000);
  assert.ok(come("newcomer", "100.64.9.1:1", later + 2_000));
});

test("limit: calls of one session, 100 at once and 20 a second; apart from them 200 reports of a punch, and 100 a second", () => {
  const { server, come, now } = office();
  const caller = come("caller", "100.64.1.1:1")!, other = come("other", "100.64.1.2:1")!;
  const bob = come("bob", "100.64.2.1:1")!;
  const call = (who: typeof caller, at = now) =>
    server.receive({
      socket: 0,
      from: who.from,
      data: who.seal(like("P2PTRANS", { to: "bob", nonce: bob.nonce, call: 1, body: NO_BYTES })),
    }, at);
  const punched = (at = now) => types(caller.say(caller.seal(like("PUNCHED", { peer: "bob" })), at));
  for (let i = 0; i < 200; i++) assert.deepEqual(punched(), ["PUNCHED"]);
  for (let i = 0; i < 100; i++) {
    assert.deepEqual(types(call(caller)).sort(), ["INTRODUCTION", "P2PSOMEONEWANTTOCALLYOU"]);
  }
  assert.equal(reasonOf(call(caller)), "busy");
  assert.deepEqual(punched(), []);
  assert.equal(types(call(other)).length, 2);
  let passed = 0;
  for (let i = 0; i < 100; i++) passed += Number(reasonOf(call(caller, now + 1_000)) === undefined && i < 20);
  assert.equal(passed, 20);
});

test("limit: datagrams of one session, 5,000 at once and 2,000 a second, whatever they ask for", () => {
  const { come, now } = office();
  const sender = come("sender", "100.64.1.1:1")!, other = come("other", "100.64.1.2:1")!;
  const bob = come("bob", "100.64.2.1:1")!;
  const empty = like("P2PTRANS", { to: "bob", nonce: bob.nonce, call: 0, body: NO_BYTES });
  const alive = like("KEEPALIVE", { cookie: NO_ID, local: [] });
  const answered = (who: typeof sender, count: number, at = now) => {
    let answers = 0;
    for (let i = 0; i < count; i++) answers += who.say(who.seal(i % 2 ? empty : alive), at).length;
    return answers;
  };
  assert.equal(answered(sender, 6_000), 5_000);
  assert.equal(answered(other, 1_000), 1_000);
  assert.equal(answered(sender, 6_000, now + 1_000), 2_000);
});

test("limit: pages of the list, 16 an answer, 2,000 at once and 200 a second", LONG, () => {
  const { come, now } = office();
  const reader = come("reader", "100.64.1.1:1")!, other = come("other", "100.64.1.2:1")!;
  const ask = (who: typeof reader, at = now) => who.say(who.seal(like("GETALLUSER", { prefix: "", after: "" })), at);
  for (let i = 0; i < 2_000; i++) assert.deepEqual(types(ask(reader)), ["USERS"]);
  assert.equal(reasonOf(ask(reader)), "busy");
  assert.deepEqual(types(ask(other)), ["USERS"]);
  let pages = 0;
  for (let i = 0; i < 300; i++) pages += types(ask(reader, now + 1_000)).filter((type) => type === "USERS").length;
  assert.equal(pages, 200);
  const crowd = numbered(400, "user-").map((name, i) => come(name, `100.64.${3 + (i >> 7)}.1:${i + 1}`));
  assert.ok(crowd.every((user) => user !== null));
  assert.equal(types(ask(other)).length, 16);
});

test("limit: relayed bytes of one session, 512 KiB at once and 256 KiB a second; another session's are untouched", () => {
  const { come, now } = office();
  const sender = come("sender", "100.64.1.1:1")!, other = come("other", "100.64.1.2:1")!;
  const bob = come("bob", "100.64.2.1:1")!;
  const pass = (who: typeof sender, at = now) =>
    who.say(who.seal(like("P2PTRANS", { to: "bob", nonce: bob.nonce, call: 0, body: new Uint8Array(512) })), at);
  const passed = (who: typeof sender, count: number, at = now) => {
    let relayed = 0;
    for (let i = 0; i < count; i++) relayed += Number(types(pass(who, at))[0] === "RELAYED");
    return relayed;
  };
  assert.equal(passed(sender, 1_200), 1_024);
  assert.equal(passed(other, 100), 100);
  assert.equal(passed(sender, 1_200, now + 1_000), 512);
  assert.equal(passed(bob, 1_200, now + 1_000), 1_024);
});

test("limit: error replies to one session, 20 at once and 10 a second", () => {
  const { come, now } = office();
  const asker = come("asker", "100.64.1.1:1")!, other = come("other", "100.64.1.2:1")!;
  const errors = (who: typeof asker, count: number, at = now) => {
    let replies = 0;
    for (let i = 0; i < count; i++) {
      const question = like("P2PTRANS", { to: "nobody", nonce: NO_ID, call: 1, body: NO_BYTES });
      replies += Number(reasonOf(who.say(who.seal(question), at)) === "unknown");
    }
    return replies;
  };
  assert.equal(errors(asker, 100), 20);
  assert.equal(errors(other, 5), 5);
  assert.equal(errors(asker, 100, now + 1_000), 10);
});
