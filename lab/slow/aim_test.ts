/**
 * An address that was validated once: whoever logged in there, and speaks from elsewhere now, cannot have the server or
 * honest clients flood it. An endpoint gets 64 KiB for each proof that somebody receives there, beyond what came from
 * it, and nothing when the last proof is 60 s old.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type ControlBody, decode, type Effect, type Endpoint, hostOf, keysFrom, type Peer } from "../../protocol.ts";
import { createServer } from "../../server.ts";
import { fiend } from "../fiend.ts";
import { dice, type Hand, hand, like, NO_BYTES, NO_ID, sends } from "../hostile.ts";
import { createWorld, join, login } from "../scenario.ts";
import { LONG, many, numbered, texts } from "../testing.ts";

const KIB = 1_024, MINUTE_MS = 60_000;
/** For one proof; and for as long as a cookie that was seen there is valid, each minute may begin with another one. */
const PER_PROOF = 64 * KIB, PROOFS = 2;
/** From here on nobody can take the address for proved any more: a cookie's life, a minute from then on, and a little. */
const OVER_MS = 125_000;
const RUN_MS = 10 * MINUTE_MS, STEP_MS = many(50, 250);

/** The host that the attacker owned for a moment, where he speaks from now, and where his accomplices are. */
const X = "198.18.5.5", HERE: Endpoint = "100.99.1.1:4000", THERE = "100.98";

// ---------------------------------------------------------------------------------------------------- the server alone

interface Member extends Hand {
  from: Endpoint;
  cookie: string; // the last that the server has sent there: what the next KEEPALIVE returns
}

/** A server without a network, so that ten minutes of messages take a second. */
function bureau() {
  const tools = dice("bureau"), keys = keysFrom(tools.bytes(32));
  const server = createServer({ keys: keysFrom(tools.bytes(32)), random: tools.bytes });
  const clock = { now: 1_700_000_000_000 };
  /** Since when the address has been left; how much has been said in its name, and by the attacker, and what it got. */
  let leftAt = Infinity, forged = 0, forgedLate = 0, written = 0, hit = 0, late = 0;
  const kinds = new Map<string, number>();

  function count<E>(effects: Effect<E>[]): Effect<E>[] {
    if (clock.now < leftAt) return effects;
    for (const { to, data } of sends(effects)) {
      if (hostOf(to) !== X) continue;
      const { type = "?" } = decode(data) ?? {};
      kinds.set(type, (kinds.get(type) ?? 0) + data.length);
      hit += data.length;
      if (clock.now >= leftAt + OVER_MS) late += data.length;
    }
    return effects;
  }

  function say(from: Endpoint, data: Uint8Array): Effect<unknown>[] {
    if (clock.now >= leftAt) {
      if (hostOf(from) === X) forged += data.length;
      else written += data.length;
      if (hostOf(from) === X && clock.now >= leftAt + OVER_MS) forgedLate += data.length;
    }
    return count(server.receive({ socket: 0, from, data }, clock.now));
  }

  function take(member: Member, effects: Effect<unknown>[]): void {
    for (const { to, data } of sends(effects)) {
      const message = to === member.from ? decode(data) : null;
      const isOurs = message?.type === "WELCOME" || message?.id === member.token;
      if (message && isOurs && "cookie" in message) member.cookie = message.cookie as string;
    }
  }

  /** Somebody logs in at an address where he receives. */
  function come(name: string, from: Endpoint, own = keys): Member {
    const self = hand(name, tools, { keys: own, clock: clock.now });
    const member: Member = Object.assign(self, { from, cookie: NO_ID });
    const [cookie] = sends(say(from, self.hello()));
    const granted = say(from, self.answer(cookie!.data)!);
    for (const { data } of sends(granted)) self.answer(data);
    assert.notEqual(member.token, "", `${name} is in`);
    take(member, granted);
    return member;
  }

  /** What an honest client says every 20 s; `from` elsewhere: what keeps the session alive, if anything does. */
  function keepalive(member: Member, from = member.from, cookie = member.cookie): void {
    take(member, say(from, member.seal(like("KEEPALIVE", { cookie, local: [] }))));
  }

  function run(ms: number, each: (t: number) => void): void {
    for (let t = 0; t < ms; t += STEP_MS, clock.now += STEP_MS) {
      if (server.wakeAt() <= clock.now) count(server.wake(clock.now));
      each(t);
    }
  }

  return {
    ...{ server, tools, clock, say, come, keepalive, run, keys },
    leave: () => void (leftAt = clock.now),
    sum: () => ({ hit, late, forged, forgedLate, written, kinds: Object.fromEntries(kinds) }),
  };
}
type Bureau = ReturnType<typeof bureau>;

interface Cast {
  five: Member[]; // who logged in at X
  cookie: string; // that was seen there
  accomplices: Member[]; // who receive where they are
  bureau: Bureau;
  t: number;
}

const target = ({ name, nonce }: Member) => ({ to: name, nonce });
const trans = (to: Member, body: number, call: 0 | 1, tools: Bureau["tools"]): ControlBody =>
  like("P2PTRANS", { ...target(to), call, body: tools.bytes(body) });

/** Each step, all that can have something sent to X. Who says it "from X" forges the source: he does not receive there. */
const AIMS: Record<string, (cast: Cast) => void> = {
  "GETALLUSER": ({ five, bureau }) => each(five, HERE, bureau, () => like("GETALLUSER", { prefix: "", after: "" })),
  "GETALLUSER from X": ({ five, bureau }) =>
    each(five, null, bureau, () => like("GETALLUSER", { prefix: "", after: "" })),
  "P2PTRANS to each other": ({ five, bureau }) =>
    each(five, HERE, bureau, (_, i) => trans(five[(i + 1) % 5]!, 900, 0, bureau.tools)),
  "P2PTRANS to each other from X": ({ five, bureau }) =>
    each(five, null, bureau, (_, i) => trans(five[(i + 1) % 5]!, 900, 0, bureau.tools)),
  "P2PTRANS to oneself": ({ five, bureau }) => each(five, HERE, bureau, (me) => trans(me, 900, 0, bureau.tools)),
  "calls of each other": ({ five, bureau }) =>
    each(five, HERE, bureau, (_, i) => trans(five[(i + 1) % 5]!, 0, 1, bureau.tools)),
  "calls by accomplices": ({ five, accomplices, bureau, t }) =>
    some(accomplices, t, 5).forEach((one, i) => bureau.say(one.from, one.seal(trans(five[i]!, 900, 1, bureau.tools)))),
  "messages by accomplices": ({ five, accomplices, bureau, t }) =>
    some(accomplices, t, 5).forEach((one, i) => bureau.say(one.from, one.seal(trans(five[i]!, 900, 0, bureau.tools)))),
  "PUNCHED by accomplices": ({ five, accomplices, bureau, t }) =>
    some(accomplices, t, 5).forEach((one, i) =>
      bureau.say(one.from, one.seal(like("PUNCHED", { peer: five[i]!.name })))
    ),
  "ERRORs": ({ five, bureau }) =>
    each(five, HERE, bureau, () => like("P2PTRANS", { to: "n".repeat(200), nonce: NO_ID, call: 0, body: NO_BYTES })),
  "KEEPALIVEs from X, without a cookie": ({ five, bureau }) =>
    each(five, null, bureau, () => like("KEEPALIVE", { cookie: NO_ID, local: [] })),
  "KEEPALIVEs from X, with the old cookie": ({ five, cookie, bureau }) =>
    each(five, null, bureau, () => like("KEEPALIVE", { cookie, local: [] })),
  "KEEPALIVEs from X, with what the WELCOME said": ({ five, bureau }) =>
    each(five, null, bureau, (me) => like("KEEPALIVE", { cookie: me.cookie, local: [] })),
  "KEEPALIVEs with the old cookie of X": ({ five, cookie, bureau }) =>
    each(five, HERE, bureau, () => like("KEEPALIVE", { cookie, local: [] })),
};

function each(five: Member[], from: Endpoint | null, { say }: Bureau, what: (me: Member, i: number) => ControlBody) {
  for (const [i, me] of five.entries()) say(from ?? me.from, me.seal(what(me, i)));
}
/** So many of them, in turns. */
const some = <T>(all: T[], t: number, count: number) =>
  Array.from({ length: count }, (_, i) => all[(count * t / STEP_MS + i) % all.length]!);

/** The sums must be so; `endpoints`: those of X that were proved. */
function judge(what: string, { sum }: Bureau, endpoints = 1): void {
  const { hit, late, forged, forgedLate, written, kinds } = sum();
  const factor = (hit / (forged + written)).toFixed(1);
  const seen = `${hit} bytes for ${forged} in its name and ${written} of the attacker's (x ${factor}), ` +
    `${late} after ${OVER_MS / 1_000} s, ${JSON.stringify(kinds)}`;
  assert.ok(hit <= forged + endpoints * PROOFS * PER_PROOF, `${what}: ${seen}`);
  // A stranger's datagram may draw a COOKIE, which is no larger.
  assert.ok(late <= forgedLate, `${what}: ${seen}`);
}

/** Five sessions log in at X, which is left at once; then ten minutes of this. */
function attack(aim: (cast: Cast) => void, { ports = 1, crowd = 200 } = {}): Bureau {
  const place = bureau(), { come, run, keepalive, leave } = place;
  const accomplices = Array.from(
    { length: crowd },
    (_, i) => come(`accomplice-${i}`, `${THERE}.${i >> 8}.${i & 255}:5000`),
  );
  const five = Array.from({ length: 5 }, (_, i) => come(`five-${i}`, `${X}:${4_000 + i % ports}`));
  const [cookie] = sends(place.say(five[0]!.from, hand("x", place.tools).hello()));
  const message = decode(cookie!.data);
  assert.ok(message?.type === "COOKIE");
  place.clock.now += 1;
  leave();
  run(RUN_MS, (t) => {
    // Each of them says something in 20 s: the accomplices where they are, the five from elsewhere.
    accomplices.forEach((one, i) =>
      Math.floor(i / crowd * 20_000 / STEP_MS) === t % 20_000 / STEP_MS && keepalive(one)
    );
    if (t % 15_000 === 0) {
      for (const one of five) place.say(HERE, one.seal(like("KEEPALIVE", { cookie: NO_ID, local: [] })));
    }
    aim({ five, cookie: message.cookie, accomplices, bureau: place, t });
  });
  return place;
}

for (const [what, aim] of Object.entries(AIMS)) {
  test(`five sessions that logged in at X and speak from elsewhere, ${what}: X is not flooded`, LONG, () => {
    judge(what, attack(aim));
  });
}

test("five sessions that logged in at five ports of X, all of it at once: X is not flooded", LONG, () => {
  const aims = Object.values(AIMS);
  judge("all at once", attack((cast) => aims[cast.t / STEP_MS % aims.length]!(cast), { ports: 5 }), 5);
});

test(
  "the LOGIN that was welcomed at X is repeated in its name, as long as its cookie is valid and longer",
  LONG,
  () => {
    const place = bureau(), { clock, say, run, leave, tools, keys } = place;
    for (let i = 0; i < 200; i++) place.come(`user-${i}`, `${THERE}.${i >> 8}.${i & 255}:5000`);
    const at = `${X}:4000`,
      five = Array.from({ length: 5 }, (_, i) => hand(`five-${i}`, tools, { keys, clock: clock.now }));
    const again = five.map((one) => {
      const [cookie] = sends(say(at, one.hello())), data = one.answer(cookie!.data)!;
      say(at, data);
      return data;
    });
    leave();
    run(RUN_MS, () => again.forEach((data) => say(at, data)));
    judge("the same LOGIN", place);
  },
);

test("other names log in at X with the cookie that was seen there, as long as it is valid and longer", LONG, () => {
  const place = bureau(), { clock, say, run, leave, tools, keys } = place, at = `${X}:4000`;
  for (let i = 0; i < 200; i++) place.come(`user-${i}`, `${THERE}.${i >> 8}.${i & 255}:5000`);
  const [first] = sends(say(at, hand("first", tools, { keys, clock: clock.now }).hello()));
  const seen = decode(first!.data);
  assert.ok(seen?.type === "COOKIE");
  leave();
  let logins = 0;
  run(RUN_MS, () => {
    for (let i = 0; i < 5; i++) {
      const self = hand(`other-${logins++}`, tools, { keys, clock: clock.now });
      // The cookie is that of the endpoint, whoever asks: so its holder answers a question of another login with it.
      const [challenge] = sends(say(HERE, self.hello())), asked = challenge && decode(challenge.data);
      if (asked?.type !== "COOKIE") continue;
      say(at, self.answer(withCookie(challenge!.data, seen.cookie))!);
    }
  });
  judge("other names", place);
});

/** The same COOKIE message with another cookie in it, the first field behind the header of 16 bytes. */
function withCookie(data: Uint8Array, cookie: string): Uint8Array {
  const changed = data.slice();
  changed.set(Buffer.from(cookie, "hex"), 16);
  return changed;
}

test("accomplices come and go, of which the few who are in are told: X is not flooded", LONG, () => {
  let comers = 0;
  judge(
    "newcomers",
    attack(({ bureau, t }) => {
      if (t % 1_000 < 250) {
        const one = bureau.come(`comer-${comers++}`, `100.97.${comers >> 8 & 255}.${comers & 255}:6000`);
        bureau.say(one.from, one.seal(like("LOGOUT", {})));
      }
    }, { crowd: 4 }),
  );
});

// ---------------------------------------------------------------------------------------------------- candidates

/** What the server tells bob of carol, whom he calls. */
function candidatesOf(carol: Member, bob: Member, { say }: Bureau): Endpoint[] {
  const answers = sends(say(bob.from, bob.seal(like("P2PTRANS", { ...target(carol), call: 1, body: NO_BYTES }))));
  const introduction = answers.map(({ data }) => decode(data)).find((message) => message?.type === "INTRODUCTION");
  assert.ok(introduction?.type === "INTRODUCTION");
  return introduction.peer.candidates;
}

const V4 = "100.97.3.3:3000", V6 = "[2001:db8:77::1]:3000";
for (const [silent, loud] of [[V6, V4], [V4, V6]] as const) {
  const which = silent === V6 ? "second address" : "first address";
  test(`a session's ${which} has been silent for 60 s: it is no candidate any more, and nothing goes there`, () => {
    const place = bureau(), { come, run, keepalive, say } = place;
    const bob = come("bob", "100.97.4.4:4000"),
      carol = come("carol", V4),
      other: Member = { ...carol, from: V6, cookie: NO_ID };
    keepalive(other); // draws a COOKIE,
    keepalive(other); // which this returns
    assert.deepEqual(candidatesOf(carol, bob, place).sort(), [V4, V6].sort());
    const alive = loud === V4 ? carol : other;
    run(50_000, (t) => t % 10_000 === 0 && [alive, bob].forEach((one) => keepalive(one)));
    run(75_000, (t) => t % 10_000 === 0 && [alive, bob].forEach((one) => keepalive(one)));
    assert.deepEqual(candidatesOf(carol, bob, place), [loud]);
    const [message] = sends(say(bob.from, bob.seal(like("P2PTRANS", { ...target(carol), call: 0, body: NO_BYTES }))));
    assert.equal(message?.to, loud);
  });
}

// ---------------------------------------------------------------------------------------------------- honest clients

/** Punches of one introduction to one endpoint (client.ts), for three of them; and a few answers. */
const PUNCHES_EACH = 14 * 3 + 8;

for (const nat of ["EIM+APDF random", "public"]) {
  test(`40 users are called with a plan for a spray, by somebody who logged in at X: few punches go there (${nat})`, () => {
    const world = createWorld({ seed: 31 });
    const names = numbered(40, "user-");
    const users = names.map((name) => join(world, name, nat === "public" ? {} : { nat }));
    login(world, ...users);
    world.net.run(5_000);
    const mallory = fiend(world, "mallory", { addresses: [X] });
    world.net.run(1_000);
    assert.ok(mallory.isIn());
    mallory.keepalive({ nat: { mapping: "APDM", filtering: "APDF", allocation: "random" } });
    mallory.say(like("GETALLUSER", { prefix: "user-", after: "" }));
    world.net.run(1_000);
    assert.ok(names.every((name) => mallory.known.has(name)));
    mallory.host.move({ addresses: [hostOf(HERE)] });
    mallory.answers = false; // a COOKIE would have him found where he is
    const from = world.net.now(), hits = new Map(names.map((name) => [name, { early: 0, late: 0, bytes: 0 }]));
    let own = 0, bytes = 0, late = 0;
    world.net.tap(({ host, to, data, at }) => {
      if (host === mallory.host.name) own += data.length;
      if (hostOf(to) !== X) return;
      bytes += data.length;
      if (at >= from + OVER_MS) late += data.length;
      const hit = hits.get(host);
      if (hit) hit[at < from + OVER_MS ? "early" : "late"]++;
    });
    const plan = (i: number): Peer => ({ type: "P2PPLAN", attempt: i % 5, spray: 1, ports: [] });
    for (let i = 0; i < 30; i++) { // each is called every 20 s
      for (const name of names) {
        mallory.relay(name, mallory.first(name, plan(i)), 1);
        world.net.run(60);
      }
      world.net.run(20_000 - 60 * names.length);
    }
    const most = Math.max(...[...hits.values()].map(({ early }) => early));
    const seen = `${bytes} bytes for ${own} of the attacker's (x ${(bytes / own).toFixed(1)}), ` +
      `${most} datagrams of one user, ${late} bytes after ${OVER_MS / 1_000} s`;
    assert.ok(most <= PUNCHES_EACH, seen);
    assert.equal(late, 0, seen);
  });
}

for (const nat of ["EIM+APDF random", "linux drop", "carrier-like"]) {
  test(`a client that says nothing behind a NAT can be reached for an hour (${nat})`, LONG, () => {
    const world = createWorld({ seed: 41 }), kind = nat === "carrier-like" ? "cgn" : nat;
    const alice = join(world, "alice", { nat: kind }), bob = join(world, "bob", { nat: "EIM+APDF random" });
    login(world, alice, bob);
    for (let minute = 0; minute < 60; minute += 20) {
      world.net.run(20 * MINUTE_MS);
      bob.send("alice", `m ${minute}`);
      world.net.run(10_000);
      assert.equal(texts(alice).at(-1), `m ${minute}`);
      assert.ok(bob.events("sent").every(({ ok, ms }) => ok && ms < 1_000));
    }
    assert.ok([alice, bob].every((player) => player.events("reconnecting").length === 0));
  });
}

for (const nat of ["EIM+APDF random", "APDM+APDF random"]) {
  test(`a client receives 2 MB over the relay in a row, all of it and in order (${nat})`, LONG, () => {
    const world = createWorld({ seed: 43 });
    const alice = join(world, "alice", { nat, direct: false }), bob = join(world, "bob", { nat, direct: false });
    login(world, alice, bob);
    const long = (i: number) => `${i} ` + "x".repeat(65_000);
    for (let i = 0; i < 32; i++) {
      alice.send("bob", long(i));
      const done = world.net.runUntil(() => alice.events("sent").length > i, 20_000);
      assert.ok(done && alice.events("sent")[i]!.ok, `message ${i}`);
    }
    assert.deepEqual(texts(bob), Array.from({ length: 32 }, (_, i) => long(i)));
    const [first] = alice.events("sent"), last = alice.events("sent").at(-1)!;
    assert.ok(last.at - first!.at < 60_000, `${last.at - first!.at} ms`);
    assert.equal(bob.events("reconnecting").length, 0);
  });
}
