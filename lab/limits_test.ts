/**
 * How much of everything a server gives to one session, to one address and to all strangers; nobody else pays for it.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type Control, decode, type Effect, encode, type Endpoint, keysFrom, MAGIC } from "../protocol.ts";
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

test("limit: strangers of one prefix, 1,000 at once and 500 a second; altogether 5,000, and 20,000 a second", () => {
  const { server, tools, come, now } = office();
  const user = come("user", "100.64.1.1:1")!;
  const alive = like("KEEPALIVE", { cookie: NO_ID, local: [] });
  const hello = hand("someone", tools).hello(), wrong = hello.slice();
  wrong.fill(1, 16, 24);
  const answered = (data: Uint8Array, count: number, at: number) => {
    let answers = 0;
    for (let i = 0; i < count; i++) {
      answers += server.receive({ socket: 0, from: `100.${64 + (i >> 8)}.${i & 255}.1:1`, data }, at).length;
    }
    return answers;
  };
  const ofOne = (data: Uint8Array, count: number, at: number) => {
    let answers = 0;
    for (let i = 0; i < count; i++) {
      answers += server.receive({ socket: 0, from: `100.63.1.${i & 255}:1`, data }, at).length;
    }
    return answers;
  };
  const later = now + 10_000;
  for (let i = 0; i < 6_000; i++) answered(Uint8Array.from([MAGIC, 7, ...new Uint8Array(40)]), 1, later); // too short to count
  assert.equal(ofOne(hello, 1_500, later) + ofOne(wrong, 500, later), 1_000); // a false cookie is as good as none
  assert.ok(come("neighbour", "100.63.2.1:1", later)); // the next prefix
  assert.equal(ofOne(hello, 1_500, later + 1_000), 500);
  const last = later + 1_000;
  const inAll = answered(wrong, 3_000, last) + answered(hello, 3_000, last); // and 500 before, at that time
  assert.ok(Math.abs(inAll - 4_500) <= 3, `${inAll} answers`);
  assert.deepEqual(types(user.say(user.seal(alive), last)), ["ALIVE"]);
  assert.equal(answered(user.seal(alive).with(2, 0xff), 100, last), 0); // nobody's token
  const borrowed = hello.slice();
  borrowed.set(user.seal(alive).subarray(2, 10), 2); // a user's token: no way around the limit
  assert.equal(answered(borrowed, 100, last), 0);
  assert.ok(answered(hello, 6_000, last + 1_000) >= 5_000);
  assert.ok(come("newcomer", "100.64.9.1:1", last + 2_000));
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
  bob.say(bob.seal(like("P2PTRANS", { to: "caller", nonce: caller.nonce, call: 2, body: NO_BYTES }))); // he knows him
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

test("limit: pages of the list, 16 an answer, 2,000 at once and 200 a second; 8 leave together, in turns", LONG, () => {
  const { server, come, now } = office();
  const reader = come("reader", "100.64.1.1:1")!, other = come("other", "100.64.1.2:1")!;
  const ask = (who: typeof reader, at = now) =>
    server.receive({ socket: 0, from: who.from, data: who.seal(like("GETALLUSER", { prefix: "", after: "" })) }, at);
  const pagesTo = (who: typeof reader, effects: Effect<unknown>[]) =>
    sends(effects).filter(({ to, data }) => to === who.from && decode(data)?.type === "USERS").length;
  let pages = 0, refusals = 0;
  for (let ms = 0; ms < 10_000; ms += 2) {
    const effects = ask(reader, now + ms);
    pages += pagesTo(reader, effects);
    refusals += Number(reasonOf(effects) === "busy");
  }
  assert.ok(Math.abs(pages - 4_000) <= 2, `${pages} pages`);
  const later = now + 10_000;
  assert.ok(refusals > 0);
  assert.equal(pagesTo(other, ask(other, later + 2)), 1);
  const crowd = numbered(400, "user-").map((name, i) => come(name, `100.64.${3 + (i >> 7)}.1:${i + 1}`, later + 4));
  assert.ok(crowd.every((user) => user !== null));
  const first = pagesTo(other, ask(other, later + 10)), second = pagesTo(other, server.wake(later + 12));
  assert.deepEqual([first, second, pagesTo(other, server.wake(later + 14))], [8, 8, 0]);
  // A hundred ask at once, and one behind them for a single page: he waits for one page of each.
  const askers = crowd.slice(0, 100) as (typeof reader)[];
  for (const asker of askers) ask(asker, later + 20);
  const data = other.seal(like("GETALLUSER", { prefix: "user-399", after: "" }));
  server.receive({ socket: 0, from: other.from, data }, later + 20);
  let at = later + 20;
  while (pagesTo(other, server.wake(at += 2)) === 0) assert.ok(at < later + 60, "he waits for ever");
  assert.ok(server.wakeAt() > at);
});

test("limit: calls to one callee of those whom he does not know, 50 at once of one prefix, 200 in all; friends apart", () => {
  const { server, tools, come, now } = office(), keys = keysFrom(tools.bytes(32)), other = keysFrom(tools.bytes(32));
  const bob = come("bob", "100.64.2.1:1")!, friend = come("friend", "100.65.1.1:1", now, keys)!;
  const call = (who: typeof bob, to = bob, says = 1, at = now) => {
    const data = who.seal(like("P2PTRANS", { to: to.name, nonce: to.nonce, call: says, body: NO_BYTES }));
    return types(server.receive({ socket: 0, from: who.from, data }, at)).includes("P2PSOMEONEWANTTOCALLYOU");
  };
  assert.ok(call(bob, friend, 3)); // he knows that one
  const callers = (prefix: number) =>
    numbered(5, `of ${prefix}-`).map((name, i) =>
      come(name.replaceAll(" ", "-"), `100.66.${prefix}.1:${i + 1}`, now, other)!
    );
  const passedFrom = (prefix: number) => {
    let passed = 0;
    for (const caller of callers(prefix)) for (let i = 0; i < 50; i++) passed += Number(call(caller));
    return passed;
  };
  assert.equal(passedFrom(1), 50);
  assert.equal(passedFrom(2), 50);
  for (const prefix of [3, 4]) passedFrom(prefix);
  assert.equal(passedFrom(5), 0); // 200 in all
  for (let i = 0; i < 99; i++) assert.ok(call(friend), `call ${i} of a friend`);
  assert.ok(call(callers(6)[0]!, friend), "nobody else's callers have used that up");
});

test("limit: relayed bytes of one session, 512 KiB at once and 256 KiB a second; another session's are untouched", () => {
  const { tools, come, now } = office();
  const [sender, other] = ["sender", "other"].map((name, i) =>
    come(name, `100.64.1.${i + 1}:1`, now, keysFrom(tools.bytes(32)))!
  ) as [NonNullable<ReturnType<typeof come>>, NonNullable<ReturnType<typeof come>>];
  const bob = come("bob", "100.64.2.1:1")!;
  const pass = (who: typeof sender, at = now) =>
    who.say(who.seal(like("P2PTRANS", { to: "bob", nonce: bob.nonce, call: 0, body: new Uint8Array(512) })), at);
  const passed = (who: typeof sender, count: number, at = now) => {
    let relayed = 0;
    for (let i = 0; i < count; i++) relayed += Number(types(pass(who, at))[0] === "RELAYED");
    return relayed;
  };
  const known = like("P2PTRANS", { to: "sender", nonce: sender.nonce, call: 2, body: NO_BYTES });
  bob.say(bob.seal(known));
  assert.equal(passed(sender, 1_200), 1_024);
  assert.equal(passed(other, 100), 100);
  assert.equal(passed(sender, 1_200, now + 1_000), 512);
  // Of those whom a callee does not know: as many bytes, with 100 more for each datagram.
  assert.equal(passed(bob, 1_200, now + 1_000), Math.floor(512 * 1024 / (512 + 100)));
});

test("limit: reports of a punch to one callee of those whom he does not know, 100 at once of one prefix, 200 in all", () => {
  const { server, tools, come, now } = office(), key = () => keysFrom(tools.bytes(32));
  const bob = come("bob", "100.64.2.1:1", now, key())!;
  const passedFrom = (prefix: number) => {
    const other = come(`of-${prefix}`, `100.66.${prefix}.1:1`, now, key())!;
    const data = () => other.seal(like("PUNCHED", { peer: "bob" }));
    let passed = 0;
    for (let i = 0; i < 150; i++) {
      passed += sends(server.receive({ socket: 0, from: other.from, data: data() }, now)).length;
    }
    return passed;
  };
  assert.deepEqual([1, 2, 3].map(passedFrom), [100, 100, 0]);
  const friend = come("friend", "100.66.9.1:1", now, key())!;
  bob.say(bob.seal(like("P2PTRANS", { to: "friend", nonce: friend.nonce, call: 2, body: NO_BYTES })), now);
  assert.equal(types(friend.say(friend.seal(like("PUNCHED", { peer: "bob" })), now)).join(), "PUNCHED");
});

test("limit: all sessions of one prefix together, ten times what one may; a quiet one beside them has a hundredth", () => {
  const { come, now } = office();
  const alive = like("KEEPALIVE", { cookie: NO_ID, local: [] });
  const error = like("P2PTRANS", { to: "nobody", nonce: NO_ID, call: 1, body: NO_BYTES });
  const said = (message: typeof alive, count: number, prefix: number) => {
    let answers = 0;
    for (let i = 0; i < 15; i++) {
      const each = come(`${message.type}-${prefix}-${i}`, `100.70.${prefix}.1:${i + 1}`)!;
      for (let n = 0; n < count; n++) answers += sends(each.say(each.seal(message), now)).length;
    }
    return answers;
  };
  assert.equal(said(error, 100, 1), 10 * 20 + 15); // the burst of ten, and one of each
  assert.ok(Math.abs(said(alive, 5_000, 2) - (10 * 5_000 + 15 * 50)) <= 2); // 20,000 a second: sums are rounded
  assert.equal(said(error, 100, 3), 10 * 20 + 15, "another prefix has its own");
});

test("limit: a LOGIN with a wrong MAC costs its prefix twenty", () => {
  const { server, tools, come, now } = office(), from = "100.64.7.1:1";
  const [challenge] = sends(server.receive({ socket: 0, from, data: hand("liar", tools).hello() }, now));
  const { cookie } = decode(challenge!.data) as Control & { type: "COOKIE" }, id = "0123456789abcdef";
  const login = like("LOGIN", { cookie, key: keysFrom(tools.bytes(32)).public, name: "liar", local: [] });
  for (let i = 0; i < 100; i++) {
    const data = encode(login, { id, counter: i, key: tools.bytes(16) });
    assert.deepEqual(server.receive({ socket: 0, from, data }, now), []);
  }
  assert.equal(come("neighbour", "100.64.7.2:1"), null, "2,000 are used up");
  assert.ok(come("other", "100.64.8.1:1"));
  assert.ok(come("neighbour", "100.64.7.2:1", now + 1_000));
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
