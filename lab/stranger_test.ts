/**
 * Strangers send anything to anybody: they are answered with no more than they bring, and nothing is kept.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { createClient } from "../client.ts";
import { type ControlBody, decode, type Effect, type Endpoint, hex, hostOf, keysFrom } from "../protocol.ts";
import { createServer } from "../server.ts";
import { assortment, corpus, dice, enter, hand, isStun, like, mayAnswer, memory, MIB } from "./hostile.ts";
import { MUTATIONS, NO_BYTES, NO_ID, office, sends, SERVER, typeOf, types, VICTIM } from "./hostile.ts";
import { village } from "./hostile.ts";
import { createWorld, DELAY_MS } from "./scenario.ts";
import { LONG, many } from "./testing.ts";

/** Split evenly over server and clients. */
const FLOOD = many(10_000_000, 100_000);

test(
  `${
    FLOOD / 2
  } random and mutated datagrams: the server answers strangers with no more than a COOKIE, and keeps nothing`,
  LONG,
  () => {
    const { world, seen, homes, talk, check, list, server } = village(2);
    const tools = dice("server flood"), { below, next, pick } = tools, any = assortment(seen, tools);
    const strangers = Array.from({ length: 50_000 }, (_, i) => `198.18.${i >> 8}.${i & 255}:${1_024 + i}`);
    const machine = server(), now = world.net.now(), wakeAt = machine.wakeAt();
    const before = memory();
    let answers = 0;
    for (let i = 0; i < FLOOD / 2; i++) {
      const origin = any(), data = pick(MUTATIONS)(origin.data, tools, any().data);
      const from = next() < 0.5 ? pick(strangers) : origin.from;
      for (const effect of machine.receive({ socket: below(2), from, data }, now)) {
        answers++;
        assert.ok(effect.kind === "send" && effect.to === from, `datagram ${i}: ${effect.kind}`);
        assert.ok(mayAnswer(data, effect.data), `datagram ${i}: ${typeOf(data)} answered by ${typeOf(effect.data)}`);
      }
    }
    const grown = memory() - before;
    console.log(`server: ${FLOOD / 2} datagrams, ${answers} answers, ${(grown / MIB).toFixed(1)} MiB`);
    assert.ok(answers > 0 && grown < 8 * MIB);
    assert.equal(machine.wakeAt(), wakeAt);
    assert.deepEqual(new Map(list().map((user) => [user.name, user.public])), homes);
    talk();
    check();
  },
);

test(
  `${FLOOD / 2} random and mutated datagrams: a client answers nobody, tells its user nothing, and keeps nothing`,
  LONG,
  () => {
    const { world, seen, alice, bob, carol, homes, talk, check } = village(3);
    const tools = dice("client flood"), { next, pick } = tools, any = assortment(seen, tools);
    const sources = [SERVER, homes.get("bob")!, homes.get("dave")!, "198.18.0.1:53", "192.168.1.1:80"];
    const now = world.net.now();
    const before = memory();
    const belated = new Map<string, number>();
    let toServer = 0;
    const targets = [alice, bob, carol], genuine = new Set(seen.map(({ data }) => hex(data)));
    for (let i = 0; i < FLOOD / 2; i++) {
      const origin = any(), data = pick(MUTATIONS)(origin.data, tools, any().data);
      const from = next() < 0.5 ? pick(sources) : origin.from;
      for (const effect of pick(targets).client.receive({ socket: 0, from, data }, now)) {
        // A COOKIE carries no MAC, since its sender may have lost all keys. Who has seen our token can make one up, but
        // can have us do no more than ask the server: a keepalive, or another login there.
        if (decode(data)?.type === "COOKIE") {
          toServer++;
          if (effect.kind === "send") assert.equal(effect.to, SERVER);
          else assert.ok(effect.kind === "event" && effect.event.event === "reconnecting");
          continue;
        }
        assert.ok(effect.kind === "send", `datagram ${i}: ${effect.kind}`);
        // A genuine punch that never arrived, and does so now; once.
        if (effect.to === from && hostOf(from) !== VICTIM && genuine.has(hex(data))) {
          assert.equal(belated.get(hex(data)) ?? i, i, `datagram ${i}: ${typeOf(data)} is answered again`);
          belated.set(hex(data), i);
        } else assert.fail(`datagram ${i}: ${typeOf(data)} from ${from}, ${typeOf(effect.data)} to ${effect.to}`);
        assert.ok(effect.data.length <= data.length, `datagram ${i}: ${typeOf(data)}`);
      }
    }
    const grown = memory() - before;
    const answers = `${toServer} answers to false COOKIEs, ${belated.size} to belated punches`;
    console.log(`clients: ${FLOOD / 2} datagrams, ${answers}, ${(grown / MIB).toFixed(1)} MiB`);
    assert.ok(toServer <= 10 * targets.length && grown < 8 * MIB);
    talk();
    check();
  },
);

test("a server that nobody has logged in to stays without a deadline, whatever strangers send", LONG, () => {
  const tools = dice("fresh server"), any = assortment(corpus, tools);
  const server = createServer({ keys: keysFrom(tools.bytes(32)), random: tools.bytes });
  for (let i = 0; i < 50_000; i++) {
    const { data, from } = any(), question = tools.pick(MUTATIONS)(data, tools, any().data);
    if (isStun(question)) continue;
    for (const effect of server.receive({ socket: 0, from, data: question }, i)) {
      assert.ok(effect.kind === "send" && effect.to === from && mayAnswer(question, effect.data));
    }
    assert.equal(server.wakeAt(), Infinity);
  }
  // STUN alone makes it remember something, for as long as its limit on an address needs that.
  const stun = Uint8Array.from(Buffer.from("000100002112a442" + "07".repeat(12), "hex")), before = memory();
  for (let i = 0; i < many(200_000, 50_000); i++) {
    const from = `100.${64 + (i >> 16)}.${i >> 8 & 255}.${i & 255}:${1_024 + i % 50_000}`;
    const [answer, second] = server.receive({ socket: 0, from, data: stun }, 60_000 + i / 100);
    assert.ok(!second && (!answer || (answer.kind === "send" && answer.to === from && mayAnswer(stun, answer.data))));
  }
  assert.ok(memory() - before < 8 * MIB);
  for (let now = 70_000; now < 200_000; now += 1_000) if (now >= server.wakeAt()) server.wake(now);
  assert.equal(server.wakeAt(), Infinity);
});

test("a client that waits for the server's first answer takes none that it has not asked for", () => {
  const tools = dice("fresh client"), any = assortment(corpus, tools);
  const zoe = createClient({
    name: "zoe",
    keys: keysFrom(tools.bytes(32)),
    servers: [SERVER],
    random: tools.bytes,
    generateKeys: () => keysFrom(tools.bytes(32)),
  });
  zoe.opened(0, 40_000, 1_000);
  const wakeAt = zoe.wakeAt();
  for (let i = 0; i < 50_000; i++) {
    const answer = tools.pick(MUTATIONS)(any().data, tools, any().data);
    assert.deepEqual(zoe.receive({ socket: 0, from: tools.pick([SERVER, "198.18.0.1:53"]), data: answer }, 1_001), []);
    assert.equal(zoe.wakeAt(), wakeAt);
  }
});

test("a server answers no answer: two servers, or two ports of one, are not set on each other by one datagram", () => {
  for (const from of ["192.0.2.2:2280", "192.0.2.1:2281", SERVER]) {
    const world = createWorld();
    const other = world.net.host({ name: "other server", addresses: ["192.0.2.2"], delayMs: DELAY_MS });
    other.run(createServer({ keys: world.keys(), random: world.bytes }) as never, { ports: [2280, 2281] });
    let datagrams = 0;
    world.net.trace = ({ fate }) => void (fate === "sent" && datagrams++);
    const ofEachType = [...new Map(corpus.map(({ data }) => [typeOf(data), data])).values()];
    for (const data of ofEachType) world.net.inject({ from, to: SERVER, data });
    world.net.run(1_000);
    assert.ok(datagrams <= 3 * ofEachType.length, `${datagrams} datagrams in a second, from ${from}`);
  }
});

test("no answer to an address that is not validated is larger than its question, whatever the message", () => {
  const { world, alice, homes, list, server } = village(4);
  const now = world.net.now();
  const stranger = `${VICTIM}:53`;
  const table: Record<string, { size: number; server: number; client: number }> = {};
  const smallest = new Map<string, Uint8Array>();
  for (const { data } of corpus) {
    const type = typeOf(data);
    if (data.length < (smallest.get(type)?.length ?? Infinity)) smallest.set(type, data);
  }
  const count = (effects: Effect<unknown>[]) => sends(effects).reduce((sum, { data }) => sum + data.length, 0);
  let worst = 0;
  for (const { data } of [...[...smallest.values()].map((data) => ({ data })), ...corpus]) {
    const row = table[typeOf(data)] ??= { size: data.length, server: 0, client: 0 };
    row.size = Math.min(row.size, data.length);
    row.server = Math.max(row.server, count(server().receive({ socket: 0, from: stranger, data }, now)) / data.length);
    row.client = Math.max(
      row.client,
      count(alice.client.receive({ socket: 0, from: stranger, data }, now)) / data.length,
    );
    if (!isStun(data)) worst = Math.max(worst, row.server, row.client);
  }
  // A logged-in user whose datagrams come from an address that has returned no cookie: the answers that a user gets
  // go to where he was, so what counts is what goes to the new address.
  const tools = dice("amplification");
  const known = enter(server(), hand("mallory", tools), { from: "100.64.9.9:1000", now })!;
  const bob = { name: "bob", nonce: like("RELAYED", {}) && NO_ID };
  const asked: ControlBody[] = [
    like("KEEPALIVE", { cookie: NO_ID, local: [] }),
    like("GETALLUSER", { prefix: "", after: "" }),
    like("PUNCHED", { peer: "bob" }),
    like("P2PTRANS", { to: bob.name, nonce: bob.nonce, call: 1, body: NO_BYTES }),
    like("P2PTRANS", { to: "nobody", nonce: NO_ID, call: 0, body: NO_BYTES }),
    like("LOGOUT", {}),
  ];
  for (const message of asked) {
    const data = known.seal(message);
    const answers = sends(known.say(data, now, stranger)).filter(({ to }) => to === stranger);
    const factor = count(answers) / data.length;
    table[`${message.type} of a user`] = { size: data.length, server: factor, client: 0 };
    worst = Math.max(worst, factor);
  }
  known.say(known.seal(like("LOGOUT", {}))); // the one from elsewhere was not heard
  // A peer at the address that the server has attested, but at a port that has never answered: an echo and a punch.
  console.table(table);
  assert.ok(worst <= 1, `${worst}`);
  assert.deepEqual(new Map(list().map((user) => [user.name, user.public])), homes);
});

test("a cookie is worth nothing at another address, at another port, or after a minute", () => {
  const { server, tools, now } = office();
  const from = "100.64.1.1:1000";
  const login = (source: Endpoint, at: number) => {
    const someone = hand(`user-${tools.below(1e9)}`, tools);
    const [cookie] = sends(server.receive({ socket: 0, from, data: someone.hello() }, now));
    return types(server.receive({ socket: 0, from: source, data: someone.answer(cookie!.data)! }, at))[0];
  };
  assert.equal(login(from, now), "WELCOME");
  assert.equal(login(from, now + 29_000), "WELCOME");
  for (const source of ["100.64.1.1:1001", "100.64.1.2:1000", `${VICTIM}:1000`]) {
    assert.equal(login(source, now), "COOKIE");
  }
  assert.equal(login(from, now + 60_000), "COOKIE");
});
