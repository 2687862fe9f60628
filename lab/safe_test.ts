/**
 * Programs of other versions, people whom one does not want to hear, and what one provider may take of a server.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type Control, decode, encode, formatEndpoint, hex, keysFrom, loginKey, VERSION } from "../protocol.ts";
import { diffieHellman, MIN_CLIENT_BYTES } from "../protocol.ts";
import { dice, enter, hand, like, NO_BYTES, NO_ID, office, part, reasonOf, rogueCrowd, sends } from "./hostile.ts";
import { createServer } from "../server.ts";
import { createWorld, deliver, join, login } from "./scenario.ts";
import { numbered, texts } from "./testing.ts";

// ---------------------------------------------------------------------------------------------------- versions

const SERVER = "192.0.2.1:2280";

for (const [theirs, who] of [[0, "the server"], [VERSION + 1, "this program"]] as const) {
  test(`a server of version ${theirs} that answers the first LOGIN: the client says to update ${who}, and ends`, () => {
    const world = createWorld({});
    world.net.tap(({ data, host }) => {
      if (host === "server" && decode(data)?.type === "COOKIE") data[16 + 8 + 32] = 2 * theirs; // the byte of `terms`
    });
    const alice = join(world, "alice");
    world.net.run(2_000);
    const [error] = alice.events("error");
    assert.equal(error?.code, "version");
    assert.equal(error.fatal, true);
    assert.match(error.message, new RegExp(`update ${who}`));
  });
}

test("a COOKIE of another version in mid-session, which nobody has sealed, does not end the client", () => {
  const world = createWorld({}), alice = join(world, "alice"), bob = join(world, "bob");
  login(world, alice, bob);
  alice.send("bob", "one");
  world.net.run(2_000);
  let token = "", id = "", counter = 0;
  world.net.tap(({ data, host }) => {
    const message = host === "alice" ? decode(data) : null;
    if (message?.type === "LOGIN") ({ id, counter } = message);
    else if (message) token = message.id;
  });
  alice.process.call((now) => alice.client.command({ command: "ping", peer: "bob", count: 3 }, now));
  world.net.run(30_000);
  const terms = { version: VERSION + 1, flag: false };
  const cookie = {
    type: "COOKIE",
    cookie: "1".repeat(16),
    key: keysFrom(dice("evil").bytes(32)).public,
    terms,
  } as const;
  for (let i = 0; i < 20; i++) {
    for (const [of, at] of [[token, 2 ** 40], [id, counter]] as const) {
      if (of) deliver(alice, { socket: 0, from: SERVER, data: encode(cookie, { id: of, counter: at }) });
    }
    world.net.run(500);
  }
  world.net.run(30_000);
  alice.send("bob", "two");
  world.net.run(5_000);
  assert.deepEqual(texts(bob), ["one", "two"]);
  assert.ok(alice.events("error").every(({ fatal }) => !fatal));
});

test("a client of the first version is told under its key which version it needs", () => {
  const { server, tools, now } = office(), keys = keysFrom(tools.bytes(32)), id = hex(tools.bytes(8));
  const from = "100.64.1.1:1",
    say = (cookie: string, key?: Uint8Array) => {
      const login = like("LOGIN", { cookie, key: keys.public, proof: NO_ID, name: "old", local: [] });
      const data = encode({ ...login, terms: { version: 0, flag: true } } as typeof login, { id, counter: 1, key });
      return sends(server.receive({ socket: 0, from, data }, now)).map((effect) => decode(effect.data)!);
    };
  const [cookie] = say(NO_ID) as (Control & { type: "COOKIE" })[];
  const key = loginKey(diffieHellman(keys.secret, cookie!.key)!, id), [error] = say(cookie!.cookie, key);
  assert.equal(error?.type === "ERROR" && error.reason, `update-to-version-${VERSION}`);
});

// ---------------------------------------------------------------------------------------------------- whom one hears

test("who is blocked is not heard, under his name or his key, and is heard again when he is not blocked any more", () => {
  const world = createWorld({ seed: 4 }), [alice, bob] = ["alice", "bob"].map((name) => join(world, name));
  login(world, alice!, bob!);
  const block = (command: "block" | "unblock") =>
    alice!.process.call((now) => alice!.client.command({ command, peer: "bob" }, now));
  bob!.send("alice", "one");
  world.net.run(2_000);
  block("block");
  assert.deepEqual(alice!.events("blocked").at(-1)?.peers, ["bob"]);
  bob!.send("alice", "two");
  world.net.run(20_000);
  assert.deepEqual(texts(alice!), ["one"]);
  assert.deepEqual(bob!.events("sent").map(({ ok }) => ok), [true, false]);
  alice!.send("bob", "three");
  assert.equal(alice!.events("sent").at(-1)?.ok, false);
  block("unblock");
  assert.deepEqual(alice!.events("blocked").at(-1)?.peers, []);
  bob!.send("alice", "four");
  world.net.run(5_000);
  assert.deepEqual(texts(alice!), ["one", "four"]);
});

test("who is blocked is not heard under a second name of the same key, in a conversation that goes on", () => {
  const world = createWorld({ seed: 6 }), keys = keysFrom(dice("two names").bytes(32));
  const [alice, bob, bobby] = ["alice", "bob", "bobby"].map((name) =>
    join(world, name, name === "alice" ? {} : { keys })
  );
  login(world, alice!, bob!, bobby!);
  for (const player of [bob!, bobby!]) player.send("alice", "one");
  world.net.run(3_000);
  alice!.process.call((now) => alice!.client.command({ command: "block", peer: "bob" }, now));
  for (const player of [bob!, bobby!]) player.send("alice", "two");
  world.net.run(20_000);
  assert.deepEqual(texts(alice!), ["one", "one"]);
});

test("a server of a newer version that comes up while we are away is told of in words, once, and we go on trying", () => {
  const world = createWorld({}), alice = join(world, "alice");
  login(world, alice);
  world.net.run(1_000);
  world.net.tap(({ data, host }) => {
    if (host === "server" && decode(data)?.type === "COOKIE") data[16 + 8 + 32] = 2 * (VERSION + 1);
  });
  world.restartServer();
  world.net.run(90_000);
  const told = alice.events("error").filter(({ code }) => code === "version");
  assert.deepEqual(told.map(({ notice, fatal }) => [notice, fatal]), [[true, undefined]]);
});

test("first messages of a thousand strangers: 200 are answered at once and 50 a second; to friends one is there", () => {
  const world = createWorld({ seed: 5, server: { maxPerAddress: 5_000 } });
  const [alice, friend] = ["alice", "friend"].map((name) => join(world, name));
  login(world, alice!, friend!);
  alice!.send("friend", "hello");
  world.net.run(3_000);
  const strangers = rogueCrowd(world, numbered(1_000, "s"), alice!);
  const before = alice!.events("message").length;
  for (const stranger of strangers) stranger.open("alice", part(0, "hi"));
  world.net.run(200);
  const heard = alice!.events("message").length - before;
  assert.ok(heard <= 215, `${heard} strangers were heard`);
  friend!.send("alice", "are you there?");
  world.net.run(1_000);
  assert.deepEqual(texts(alice!, "friend"), ["are you there?"]);
});

// ---------------------------------------------------------------------------------------------------- one provider

test("who has a whole IPv6 /32 fills half of a server: people from elsewhere are let in", () => {
  const { come, now } = office({ maxUsers: 1_000, maxPerAddress: 4 });
  let inside = 0;
  for (let i = 0; i < 2_000; i++) {
    inside += Number(come(`rogue-${i}`, formatEndpoint(`2001:db8:${i.toString(16)}::1`, 4_000), now + i * 5) !== null);
  }
  assert.equal(inside, 500);
  assert.ok(come("newcomer", "198.51.100.7:1", now + 10_000));
  assert.ok(come("other", "[2001:db9::1]:1", now + 10_000));
});

test("a cookie that has come back proves nothing a second time, nor do two in turns", () => {
  const { server, tools, now } = office(), keys = keysFrom(tools.bytes(32)), from = "198.51.100.1:1";
  const say = (at: number, cookie: string, seal?: { id: string; key: Uint8Array }) => {
    const name = `name-${hex(tools.bytes(4))}`, { id, key } = seal ?? { id: hex(tools.bytes(8)), key: undefined };
    const data = encode(like("LOGIN", { cookie, key: keys.public, proof: NO_ID, name, local: [] }), {
      id,
      counter: 1,
      key,
    });
    return sends(server.receive({ socket: 0, from, data }, at));
  };
  const cookieAt = (at: number) => decode(say(at, NO_ID)[0]!.data) as Control & { type: "COOKIE" };
  const first = cookieAt(now), second = cookieAt(now + 30_000); // valid at the same time
  const shared = diffieHellman(keys.secret, first.key)!;
  let bytes = 0;
  for (let i = 0; i < 400; i++) {
    const id = hex(tools.bytes(8)), at = now + 30_001 + i * 60;
    const answers = say(at, (i % 2 ? first : second).cookie, { id, key: loginKey(shared, id) });
    bytes += answers.reduce((sum, { data }) => sum + data.length, 0);
  }
  const sent = 400 * MIN_CLIENT_BYTES * 2; // at most so much came from there
  assert.ok(bytes > 64 * 1024 && bytes <= 2 * 64 * 1024 + sent, `${bytes} bytes`);
});

test("a login whose WELCOME was lost over IPv6, and that goes on over IPv4, is welcomed there", () => {
  const { server, tools, now } = office(), self = hand("both", tools), [v6, v4] = ["[2001:db8::7]:1", "198.51.100.7:1"];
  const say = (from: string, data: Uint8Array) => sends(server.receive({ socket: 0, from, data }, now));
  const logIn = (from: string) => say(from, self.answer(say(from, self.hello())[0]!.data)!);
  const [lost] = logIn(v6!), [welcome] = logIn(v4!);
  assert.deepEqual([lost, welcome].map((effect) => [effect!.to, decode(effect!.data)!.type]), [
    [v6, "WELCOME"],
    [v4, "WELCOME"],
  ]);
  self.answer(welcome!.data);
  const [alive] = say(v4!, self.seal(like("KEEPALIVE", { cookie: NO_ID, local: [] })));
  assert.equal(decode(alive!.data)?.type, "ALIVE");
});

/** Somebody with a place in each IP version; `alive` shows that he is there, at the places given. */
function twoPlaces(name = "both") {
  const { server, tools, come, now } = office(), keys = keysFrom(tools.bytes(32));
  const v4 = "198.51.100.7:1", v6 = "[2001:db8::7]:1", cookies = new Map<string, string>();
  const user = enter(server, hand(name, tools, { keys }), { from: v6, now })!;
  const alive = (at: number, ...places: string[]) => {
    for (const from of places) {
      for (let i = 0; i < 3; i++) { // a COOKIE first, then the cookie, then that of the ALIVE
        const data = user.seal(like("KEEPALIVE", { cookie: cookies.get(from) ?? "1".repeat(16), local: [] }));
        for (const effect of sends(server.receive({ socket: 0, from, data }, at))) {
          const message = decode(effect.data)!;
          if (message.type === "COOKIE" || message.type === "ALIVE") cookies.set(from, message.cookie);
        }
      }
    }
  };
  const sweepTo = (end: number) => {
    for (let due = server.wakeAt(); due <= end; due = server.wakeAt()) server.wake(due);
  };
  const candidatesAt = (at: number) => {
    const caller = come(`caller-${at}`, "192.0.2.55:1", at)!;
    const data = caller.seal(like("P2PTRANS", { to: name, nonce: user.nonce, call: 1, body: NO_BYTES }));
    const answers = sends(server.receive({ socket: 0, from: caller.from, data }, at));
    const introduction = answers.map((effect) => decode(effect.data)!).find(({ type }) => type === "INTRODUCTION");
    const reached = answers.find((effect) => decode(effect.data)!.type === "P2PSOMEONEWANTTOCALLYOU")?.to;
    return [introduction?.type === "INTRODUCTION" ? introduction.peer.candidates : null, reached];
  };
  alive(now, v4, v6);
  return { server, tools, come, now, user, v4, v6, alive, sweepTo, candidatesAt };
}

test("a place that has not been proved for 60 s is no candidate, the first one or the other, before any sweep too", () => {
  const both = twoPlaces(), { now, v4, v6 } = both;
  assert.deepEqual(both.candidatesAt(now + 1_000), [[v6, v4], v6]);
  both.alive(now + 40_000, v4);
  assert.deepEqual(both.candidatesAt(now + 60_500), [[v4], v4], "the first one is silent");
  both.sweepTo(now + 62_000);
  assert.deepEqual(both.candidatesAt(now + 62_000), [[v4], v4], "and given up");
  both.alive(now + 90_000, v4, v6);
  assert.deepEqual(both.candidatesAt(now + 90_000), [[v4, v6], v4]);
  both.alive(now + 140_000, v4);
  assert.deepEqual(both.candidatesAt(now + 151_000), [[v4], v4], "the other one is silent");
});

test("who leaves leaves both of his places: he who has the name then keeps it", () => {
  const { server, come, now, user, v4, sweepTo } = twoPlaces();
  server.receive({ socket: 0, from: v4, data: user.seal(like("LOGOUT", {})) }, now + 1_000);
  const heir = come("both", "203.0.113.9:1", now + 62_000)!;
  const say = (at: number) => sends(heir.say(heir.seal(like("GETALLUSER", { prefix: "both", after: "" })), at));
  sweepTo(now + 64_000);
  const page = decode(say(now + 64_000)[0]!.data);
  assert.deepEqual(page?.type === "USERS" && page.users.map(({ name }) => name), ["both"]);
});

test("WELCOME counts too, and a place that is welcomed again and again is asked whether anybody is there", () => {
  const { server, tools, come, now } = office(), self = hand("again", tools), from = "198.51.100.8:1";
  for (let i = 0; i < 40; i++) come(`user-${i}`, `203.0.113.1:${i + 1}`);
  const say = (data: Uint8Array) => sends(server.receive({ socket: 0, from, data }, now));
  const login = self.answer(say(self.hello())[0]!.data)!, types = new Map<string, number>();
  let bytes = 0;
  for (let i = 0; i < 200; i++) {
    for (const { to, data } of say(login)) {
      if (to !== from) continue;
      bytes += data.length;
      types.set(decode(data)!.type, (types.get(decode(data)!.type) ?? 0) + 1);
    }
  }
  assert.ok(bytes > 60 * 1024 && bytes <= 64 * 1024 && types.get("COOKIE")! >= 5, `${bytes} bytes, ${[...types]}`);
});

test("a wrong password is told to the operator with its address: 20 at once and one a second", () => {
  const { server, come, now } = office({ password: new Uint8Array(32).fill(1) });
  let told = 0;
  const watch = (at: number) => {
    const before = told, { receive } = server;
    server.receive = (datagram, time) => {
      const effects = receive(datagram, time);
      for (const effect of effects) {
        if (effect.kind !== "event") continue;
        assert.deepEqual(effect.event, {
          event: "refused",
          name: "x",
          public: "198.51.100.9:1",
          reason: "bad-password",
        });
        told++;
      }
      return effects;
    };
    for (let i = 0; i < 50; i++) assert.equal(come("x", "198.51.100.9:1", at), null);
    server.receive = receive;
    return told - before;
  };
  assert.deepEqual([watch(now), watch(now + 3_000)], [20, 3]);
});

test("a client whose KEEPALIVE is late by less than the next sweep stays, and vanishes when it is silent", () => {
  const { server, come, now } = office(), user = come("late", "198.51.100.1:1")!;
  const say = (cookie: string, at: number) =>
    user.say(user.seal(like("KEEPALIVE", { cookie, local: [] })), at).map((effect) =>
      effect.kind === "send" ? decode(effect.data)! : null
    );
  for (let due = server.wakeAt(); due < now + 60_000; due = server.wakeAt()) server.wake(due);
  const challenge = sends(server.receive({
    socket: 0,
    from: user.from,
    data: user.seal(like("KEEPALIVE", { cookie: "2".repeat(16), local: [] })),
  }, now + 60_100));
  const cookie = decode(challenge[0]?.data ?? NO_BYTES);
  if (cookie?.type === "COOKIE") say(cookie.cookie, now + 60_200);
  let gone = 0;
  for (let due = server.wakeAt(); due < now + 200_000; due = server.wakeAt()) {
    gone += server.wake(due).filter((effect) => effect.kind === "event" && effect.event.event === "logout").length;
  }
  assert.equal(gone, 1);
  assert.ok(come("late", "203.0.113.9:1", now + 200_000), "the name is free");
});

test("questions whether somebody is there count too: one who left draws 64 KiB more than he brought, however he asks", () => {
  const { tools, now } = office(), keys = keysFrom(tools.bytes(32));
  const server = createServer({ keys: keysFrom(tools.bytes(32)), random: tools.bytes });
  const one = enter(server, hand("one", tools, { keys }), { from: "198.51.100.1:1", now })!;
  const other = enter(server, hand("other", tools, { keys }), { from: "203.0.113.1:1", now })!;
  let brought = 0, drawn = 0;
  for (let i = 0; i < 8_000; i++) {
    const body = new Uint8Array(i < 200 ? 200 : 7);
    const calls = [
      { by: other, message: like("P2PTRANS", { to: "one", nonce: one.nonce, call: 0, body }) },
      ...i < 100 ? [] : [{ by: one, message: like("PUNCHED", { peer: "nobody" }) }],
    ];
    for (const { by, message } of calls) {
      const data = by.seal(message);
      if (by === one) brought += data.length;
      for (const effect of sends(by.say(data, now + i * 5))) if (effect.to === one.from) drawn += effect.data.length;
    }
  }
  assert.ok(drawn > 64 * 1024 && drawn - brought <= 64 * 1024, `${drawn - brought} bytes beyond ${brought}`);
});

test("strangers leave half of what may go to a callee to his friends; a full place is asked once a second; 64 KiB in all", () => {
  const { tools, now } = office(), key = () => keysFrom(tools.bytes(32));
  const server = createServer({ keys: key(), random: tools.bytes });
  const come = (name: string, from: string) => enter(server, hand(name, tools, { keys: key() }), { from, now })!;
  const bob = come("bob", "198.51.100.1:1"),
    friend = come("friend", "203.0.113.1:1"),
    other = come("other", "192.0.2.9:1");
  bob.say(bob.seal(like("P2PTRANS", { to: "friend", nonce: friend.nonce, call: 2, body: NO_BYTES })));
  let drawn = 0, questions = 0; // WELCOME is a small part of it
  const relay = (by: typeof bob, count: number, at = now) => {
    const before = drawn;
    for (let i = 0; i < count; i++) {
      const data = by.seal(like("P2PTRANS", { to: "bob", nonce: bob.nonce, call: 0, body: new Uint8Array(800) }));
      for (const { to, data: sent } of sends(by.say(data, at))) {
        if (to !== bob.from) continue;
        drawn += sent.length;
        questions += Number(decode(sent)?.type === "COOKIE");
      }
    }
    return drawn - before;
  };
  const half = relay(other, 100);
  assert.ok(half > 28 * 1024 && half < 34 * 1024, `${half} bytes of a stranger`);
  assert.ok(relay(friend, 100) > 24 * 1024, "a friend has the other half");
  const asked = questions;
  for (let second = 2; second < 55; second++) relay(friend, 3, now + second * 1_000);
  assert.ok(questions > asked + 10, `${questions - asked} questions when nothing else goes`);
  assert.ok(drawn <= 64 * 1024, `${drawn} bytes`);
});

test("who takes the name of a friend is no friend, and a quiet session is heard beside noisy neighbours", () => {
  const { server, tools, come, now } = office({ maxPerAddress: 100 }), key = () => keysFrom(tools.bytes(32));
  const alice = come("alice", "198.51.100.1:1", now, key())!, bob = come("bob", "203.0.113.1:1", now, key())!;
  const call = (who: typeof bob, to: typeof bob, says: number) => {
    const data = who.seal(like("P2PTRANS", { to: to.name, nonce: to.nonce, call: says, body: NO_BYTES }));
    const answers = sends(server.receive({ socket: 0, from: who.from, data }, now));
    return answers.some((effect) => decode(effect.data)?.type === "P2PSOMEONEWANTTOCALLYOU");
  };
  assert.ok(call(alice, bob, 3));
  bob.say(bob.seal(like("LOGOUT", {})), now);
  const thief = come("bob", "192.0.2.77:1", now, key())!;
  assert.equal(Array.from({ length: 90 }, () => call(thief, alice, 1)).filter(Boolean).length, 50);
  const neighbours = numbered(12, "n").map((name, i) => come(name.replace(" ", "-"), `203.0.113.50:${i + 1}`, now)!);
  for (const each of neighbours) {
    for (let i = 0; i < 5_000; i++) each.say(each.seal(like("PUNCHED", { peer: "x" })), now);
  }
  const quiet = come("quiet", "203.0.113.60:1", now)!;
  assert.ok(
    sends(quiet.say(quiet.seal(like("KEEPALIVE", { cookie: NO_ID, local: [] })), now)).some(({ data }) =>
      decode(data)?.type === "ALIVE"
    ),
  );
});

test("names held for one prefix are 500 at most: the others' stay held", () => {
  const { server, tools, come, now } = office({ maxPerAddress: 20_000 });
  const keys = keysFrom(tools.bytes(32)), keep = { keys, keepName: true };
  const vanish = (name: string, from: string, at: number) =>
    assert.ok(enter(server, hand(name, tools, keep), { from, now: at }), name);
  vanish("alice", "198.51.100.1:1", now);
  for (let i = 0; i < 11_000; i++) {
    vanish(`rogue-${i}`, `100.${64 + i % 2}.${i % 100}.1:${1_000 + (i >> 1)}`, now + i * 2);
  }
  let at = now + 95_000;
  for (; server.wakeAt() < now + 100_000;) server.wake(at = Math.max(at, server.wakeAt()));
  assert.equal(come("alice", "203.0.113.1:1", at), null, "alice's name is held");
  assert.ok(come("rogue-10999", "203.0.113.2:1", at), "beyond the share nobody's is");
});

test("a datagram too small for a COOKIE draws none, whether there is a session or not", () => {
  const { server, come, now } = office(), user = come("user", "100.64.1.1:1")!;
  const small = user.seal(like("LOGOUT", {})).subarray(0, MIN_CLIENT_BYTES - 1);
  for (const from of [user.from, "100.64.9.9:9"]) {
    assert.deepEqual(server.receive({ socket: 0, from, data: small }, now), []);
  }
  const call = like("P2PTRANS", { to: "nobody", nonce: NO_ID, call: 1, body: NO_BYTES });
  assert.equal(reasonOf(user.say(user.seal(call), now)), "unknown");
});
