/**
 * What must not happen: strangers, forgers, observers, peers and servers that mean harm, in the simulated internet.
 *
 *     stranger     sends anything to anybody
 *     forger       is off the path, knows all addresses, names, public keys and nonces, writes any source address
 *     observer     is on the path: sees every datagram, repeats, delays and redirects them, has no keys
 *     rogue        is logged in, a client that keeps none of the rules
 *     evil server  introduces whom it likes as whom it likes
 *
 * PUNCH_FULL=1 takes ten million datagrams instead of one, and 1,000 clients instead of 200.
 *
 * @module
 */
import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import v8 from "node:v8";
import vm from "node:vm";
import { createClient } from "../client.ts";
import {
  concat,
  type Control,
  type ControlBody,
  controlKeys,
  type Datagram,
  decode,
  decodeHandshake,
  diffieHellman,
  type Effect,
  encode,
  encodeHandshake,
  encodeInner,
  type Endpoint,
  formatEndpoint,
  type Handshake,
  hex,
  hostOf,
  initiate,
  type Initiation,
  type KeyPair,
  keysFrom,
  loginKey,
  MAGIC,
  MAX_DATAGRAM_BYTES,
  messageTable,
  openPeer,
  type Peer,
  publicNonce,
  sealPeer,
  type User,
} from "../protocol.ts";
import { createServer, type Server } from "../server.ts";
import { random, type TraceRecord } from "./network.ts";
import { createWorld, DELAY_MS, join, login, type Player, type PlayerOptions, R, type World } from "./scenario.ts";

const FULL = process.env["PUNCH_FULL"] === "1";
/** Split evenly over server and clients. */
const FLOOD = FULL ? 10_000_000 : 1_000_000;
const CLIENTS = FULL ? 1_000 : 200;

/** For bun test, which gives a test 5 s. */
const LONG = { timeout: 900_000 };

const SERVER = "192.0.2.1:2280";
/** A third party: nobody may be made to write there. */
const VICTIM = "198.18.0.1";
const NO_ID = "0".repeat(16);
const NO_BYTES = new Uint8Array(0);

// ---------------------------------------------------------------------------------------------------- bytes

const nameOf = new Map(messageTable().map(({ code, name }) => [code, name]));
const typeOf = (data: Uint8Array) =>
  data[0] === MAGIC ? nameOf.get(data[1] ?? 0) ?? "no message" : (data[0] ?? 4) < 4 ? "STUN" : "noise";
const isStun = (data: Uint8Array) => typeOf(data) === "STUN";
/** STUN alone may answer with more than the question: 1.6 times, IPv6 2.2 (DESIGN 4). */
const mayAnswer = (question: Uint8Array, answer: Uint8Array) =>
  isStun(question)
    ? isStun(answer) && answer.length <= 2.2 * question.length
    : typeOf(answer) === "COOKIE" && answer.length <= question.length;

/** A stream of random bytes and choices. */
function dice(seed: string) {
  const next = random(seed);
  const noise = Uint8Array.from({ length: 65_536 }, () => Math.floor(next() * 256));
  const below = (limit: number) => Math.floor(next() * limit);
  const bytes = (length: number) => {
    const at = below(noise.length - length);
    noise[at]! ^= 1 << below(8);
    return noise.slice(at, at + length);
  };
  return { next, below, bytes, pick: <T>(items: readonly T[]) => items[below(items.length)]! };
}
type Dice = ReturnType<typeof dice>;

const MUTATIONS: ((data: Uint8Array, dice: Dice, other: Uint8Array) => Uint8Array)[] = [
  (_, { bytes, below }) => bytes(below(1_400)),
  (_, { bytes, below }) => concat(Uint8Array.of(MAGIC), bytes(below(200))),
  (_, { bytes, below, pick }) => concat(Uint8Array.of(MAGIC, pick([...nameOf.keys()])), bytes(below(1_198))),
  (_, { bytes, below }) => concat(Uint8Array.of(below(4)), bytes(below(80))),
  (data, { below }) => data.slice(0, below(data.length)),
  (data, { bytes, below }) => concat(data, bytes(below(64))),
  (data, { bytes, below }) => {
    const at = below(data.length);
    return concat(data.subarray(0, at), bytes(below(9)), data.subarray(at + below(9)));
  },
  (data, { below }, other) => concat(data.subarray(0, below(data.length)), other.subarray(below(other.length))),
  (data, { pick }) => {
    const changed = data.slice();
    changed[1] = pick([...nameOf.keys()]);
    return changed;
  },
  (data, { below }) => {
    const changed = data.slice();
    for (let flips = 1 + below(8); flips > 0; flips--) changed[below(changed.length)]! ^= 1 << below(8);
    return changed;
  },
  (data, { below, pick }) => { // a length or a number at its limits
    const changed = data.slice();
    changed.fill(pick([0, 1, 127, 128, 255]), below(data.length), below(data.length) + 4);
    return changed;
  },
  (data) => data,
];

/** Picks a datagram, each type as often as any other. */
function assortment(seen: Seen[], { pick }: Dice): () => Seen {
  const types = [...Map.groupBy(seen, ({ data }) => typeOf(data)).values()];
  return () => pick(pick(types));
}

/** Bytes that are in use after a collection. */
function memory(): number {
  if ("Bun" in globalThis) (globalThis as unknown as { Bun: { gc(force: boolean): void } }).Bun.gc(true);
  else {
    v8.setFlagsFromString("--expose-gc");
    (vm.runInNewContext("gc") as () => void)();
  }
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}
const MIB = 2 ** 20;

// ---------------------------------------------------------------------------------------------------- the village

interface Seen {
  from: Endpoint;
  to: Endpoint;
  data: Uint8Array;
}

const texts = (player: Player, from?: string) =>
  player.events("message").filter((message) => !from || message.from === from).map(({ text }) => text);
const numbered = (count: number, what: string) => Array.from({ length: count }, (_, i) => `${what}${i}`);
const sends = <T>(effects: Effect<T>[]) => effects.filter((effect) => effect.kind === "send");

/** From now on the server is what `wrap` makes of it, also after a restart. */
function takeOver(world: World, wrap: (server: Server) => Server): void {
  const { run } = world.serverHost;
  world.serverHost.run = (machine, options) => run(wrap(machine as unknown as Server) as never, options);
  world.restartServer();
}

/** What crosses the core from now on, but for what was injected. */
function observe(world: World): Seen[] {
  const seen: Seen[] = [];
  world.net.tap(({ host, from, to, data }) => {
    if (host !== "") seen.push({ from, to, data: data.slice() });
  });
  return seen;
}

/** What is sent to the third party from now on. */
function watchVictim(world: World): TraceRecord[] {
  const hits: TraceRecord[] = [];
  world.net.tap((packet) => {
    if (hostOf(packet.to) === VICTIM) hits.push({ ...packet, data: packet.data.slice() });
  });
  return hits;
}

/** Alice and bob talk directly, carol and dave over the relay; every message of the protocol has crossed the core. */
function village(seed: number) {
  const world = createWorld({ seed });
  let server!: Server;
  takeOver(world, (machine) => server = machine);
  const seen = observe(world);
  const symmetric = { nat: "APDM+APDF random" }, cone = { nat: "EIM+APDF random" };
  const alice = join(world, "alice", cone), bob = join(world, "bob", cone);
  const carol = join(world, "carol", symmetric), dave = join(world, "dave", symmetric);
  const all = [alice, bob, carol, dave];
  login(world, ...all);
  world.net.run(1_000);
  const erin = join(world, "erin", cone);
  login(world, erin);
  let round = 0;
  /** A message each way in both conversations; all arrive, once. */
  function talk(): void {
    const text = `round ${round++}`;
    for (const [one, other] of [[alice, bob], [carol, dave]] as const) {
      one.send(other.name, text);
      world.net.run(10);
      other.send(one.name, text);
    }
    world.net.run(4_000);
  }
  function check(): void {
    const expected = numbered(round, "round ");
    for (const player of all) {
      assert.deepEqual(texts(player), expected, `what ${player.name} has heard`);
      assert.ok(player.events("sent").filter(({ to }) => to !== "nobody").every(({ ok }) => ok));
    }
    for (const [player, peer] of [[alice, "bob"], [bob, "alice"]] as const) {
      assert.equal(player.events("path").findLast((event) => event.peer === peer)?.path, "direct");
    }
  }
  /** The list of users as alice gets it. */
  function list() {
    const before = alice.events("users").length;
    alice.command({ command: "getu", prefix: "" });
    world.net.run(1_000);
    return alice.events("users")[before]!.users;
  }
  talk();
  talk();
  alice.send("nobody", "hello?");
  erin.send("alice", "");
  list();
  erin.nat!.readdress("203.0.113.200");
  world.net.run(30_000);
  erin.command({ command: "exit" });
  talk();
  world.net.run(60_000); // the cookies of the logins are stale
  talk();
  check();
  /** Where each of them is seen. */
  const homes = new Map(list().map((user) => [user.name, user.public]));
  return { world, seen, all, alice, bob, carol, dave, homes, talk, check, list, server: () => server };
}

const corpus = village(1).seen;
for (const { name } of messageTable()) {
  if (name !== "P2PPLAN" && !corpus.some(({ data }) => typeOf(data) === name)) throw new Error(`No ${name} was seen`);
}

/** A message like those that were seen, with other fields: so that fields that are added later need no change here. */
function like<T extends ControlBody["type"]>(type: T, fields: Partial<Extract<ControlBody, { type: T }>>): ControlBody {
  for (const { data } of corpus) {
    const message = decode(data);
    if (message?.type === type) return { ...message, ...fields } as ControlBody;
  }
  throw new Error(`No ${type} was seen`);
}

// ---------------------------------------------------------------------------------------------------- by hand

/** What client.ts mixes into a handshake: it must be the same here, or no rogue gets in. */
interface Party {
  name: string;
  nonce: string;
}
const prologue = (initiator: Party, responder: Party) =>
  new TextEncoder().encode(`punch ${initiator.name} ${initiator.nonce} ${responder.name} ${responder.nonce}`);

/** A client's end of a login, by hand. */
interface Hand {
  name: string;
  keys: KeyPair;
  token: string;
  nonce: string;
  /** The first LOGIN, without a cookie. */
  hello(): Uint8Array;
  /** The answer to a COOKIE, or nothing; a WELCOME is taken in. */
  answer(data: Uint8Array): Uint8Array | null;
  /** Seals a message for the session, with the next counter or that one. */
  seal(message: ControlBody, counter?: number): Uint8Array;
}

const secrets = new Map<string, Uint8Array>();
/** The same keys may log in ten thousand times. */
function sharedWith({ secret, public: own }: KeyPair, theirs: Uint8Array): Uint8Array {
  const pair = hex(own) + hex(theirs);
  const shared = secrets.get(pair) ?? diffieHellman(secret, theirs)!;
  secrets.set(pair, shared);
  return shared;
}

function hand(name: string, dice: Dice, { keys = keysFrom(dice.bytes(32)), clock = 1, keepName = 0 } = {}): Hand {
  const loginId = hex(Uint8Array.from({ length: 8 }, () => dice.below(256))); // never the same twice
  let sent = clock, shared: Uint8Array = NO_BYTES, toServer: Uint8Array = NO_BYTES;
  const loginWith = (cookie: string, key?: Uint8Array) =>
    encode(like("LOGIN", { cookie, key: keys.public, proof: NO_ID, keepName, name, local: [] }), {
      id: loginId,
      counter: clock,
      key,
    });
  const self: Hand = {
    name,
    keys,
    token: "",
    nonce: publicNonce(loginId),
    hello: () => loginWith(NO_ID),
    answer(data) {
      const message = decode(data);
      if (message?.type === "COOKIE" && message.id === loginId) {
        shared = sharedWith(keys, message.key);
        return loginWith(message.cookie, loginKey(shared, loginId));
      }
      if (message?.type === "WELCOME" && message.id === loginId) {
        self.token = message.token;
        toServer = controlKeys(shared, message.token).toServer;
      }
      return null;
    },
    seal: (message, counter = ++sent) => encode(message, { id: self.token, counter, key: toServer }),
  };
  return self;
}

/** Logs in at a machine, without a network; null if that was not granted. */
function enter(server: Server, self: Hand, { from, now }: { from: Endpoint; now: number }) {
  const say = (data: Uint8Array, at = now, source = from) => server.receive({ socket: 0, from: source, data }, at);
  const [cookie] = sends(say(self.hello()));
  const granted = cookie && sends(say(self.answer(cookie.data)!));
  for (const { data } of granted ?? []) self.answer(data);
  return self.token === "" ? null : { ...self, from, say };
}

/** A logged-in client on the network that keeps none of the rules. */
interface Rogue extends Hand {
  at: Endpoint;
  /** Everything that came in. */
  heard: Seen[];
  users: Map<string, User>;
  /** To the server. */
  say(message: ControlBody): void;
  /** To anybody. */
  write(to: Endpoint, data: Uint8Array): void;
  /** Opens a session with a user of that name by a first message that carries this. */
  open(to: string, frame: Peer): void;
  /** Once that session is there. */
  isOpen(): boolean;
  /** Seals a message of that session. */
  sealed(frame: Peer, counter?: number): Uint8Array;
  /** Opens what the victim sent in that session. */
  frameOf(data: Uint8Array): Peer | null;
  /** Sends such bytes over the server. */
  relay(body: Uint8Array): void;
  /** Called with each message that the victim sent. */
  onFrame: (frame: Peer, from: Endpoint) => Uint8Array | null;
  stream: string;
}

let rogues = 0;

function rogue(world: World, name: string, { address, psk = new Uint8Array(32) }: {
  address?: string;
  psk?: Uint8Array;
} = {}): Rogue {
  const dice_ = dice(`rogue ${name}`);
  const site = rogues++ % 60_000;
  const host = world.net.host({
    name: `rogue ${name} ${site}`,
    addresses: [address ?? `100.${128 + Math.floor(site / 250) % 100}.7.${site % 250 + 1}`],
    delayMs: DELAY_MS,
  });
  const self = hand(name, dice_, { clock: Math.floor(world.net.now()) });
  let target: User | null = null, initiation: Initiation | null = null;
  let session: { theirs: number; send: Uint8Array; receive: Uint8Array; sent: number } | null = null;
  const index = dice_.below(2 ** 32);

  function takePeer(data: Uint8Array, from: Endpoint): Uint8Array | null {
    const handshake = decodeHandshake(data);
    if (handshake?.type === "P2PSECOND") {
      const finished = session ? null : initiation?.finish(handshake.noise);
      if (finished) {
        session = { theirs: handshake.from, send: finished.keys.send, receive: finished.keys.receive, sent: 0 };
      }
      return takePeer(handshake.sealed, from);
    }
    const frame = session && openPeer(data, session.receive);
    return frame ? me.onFrame(frame, from) : null;
  }

  const port = host.run<never>({
    opened: () => [],
    wake: () => [],
    wakeAt: () => Infinity,
    receive({ socket, from, data }) {
      me.heard.push({ from, to: me.at, data: data.slice() });
      const message = decode(data);
      let reply = self.answer(data);
      if (message && "users" in message) { for (const user of message.users) me.users.set(user.name, user); }
      if (message?.type === "RELAYED" || message?.type === "P2PSOMEONEWANTTOCALLYOU") takePeer(message.body, from);
      else if (!message) reply = takePeer(data, from);
      return reply ? [{ kind: "send", socket, to: from, data: reply }] : [];
    },
  });
  const me: Rogue = {
    ...self,
    at: formatEndpoint(host.addresses[0]!, port.ports[0]!),
    heard: [],
    users: new Map(),
    stream: hex(dice_.bytes(8)),
    onFrame: () => null,
    write: (to, data) => port.perform([{ kind: "send", socket: 0, to, data }]),
    say: (message) => me.write(SERVER, self.seal(message)),
    open(to, frame) {
      target = me.users.get(to)!;
      session = null;
      initiation = initiate({
        own: self.keys,
        peer: target.key,
        psk,
        prologue: prologue(self, target),
        ephemeral: keysFrom(dice_.bytes(32)),
      }, concat(Buffer.from(me.stream, "hex"), encodeInner(frame)));
      const body = encodeHandshake({ type: "P2PFIRST", from: index, probe: 0, noise: initiation!.message });
      me.say(like("P2PTRANS", { to, nonce: target.nonce, call: 1, body }));
    },
    isOpen: () => session !== null,
    sealed: (frame, counter = session!.sent++) =>
      sealPeer(frame, { index: session!.theirs, counter, key: session!.send }),
    frameOf: (data) => session && openPeer(data, session.receive),
    relay: (body) => me.say(like("P2PTRANS", { to: target!.name, nonce: target!.nonce, call: 0, body })),
  };
  Object.defineProperty(me, "token", { get: () => self.token });
  me.write(SERVER, self.hello());
  return me;
}

/** Rogues that are in and know who is there. */
function rogueCrowd(world: World, names: string[], victim: Player): Rogue[] {
  const crowd = names.map((name) => rogue(world, name));
  world.net.run(3 * R);
  for (const each of crowd) each.say(like("GETALLUSER", { prefix: victim.name, after: "" }));
  world.net.run(2 * R);
  assert.ok(crowd.every((each) => each.token !== "" && each.users.has(victim.name)));
  return crowd;
}

const part = (seq: number, text: string | Uint8Array, { base = 0, left = 0 } = {}): Peer => ({
  type: "P2PMESSAGE",
  seq,
  base,
  left,
  part: typeof text === "string" ? new TextEncoder().encode(text) : text,
});

// ---------------------------------------------------------------------------------------------------- strangers

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
  for (let i = 0; i < 200_000; i++) {
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

// ---------------------------------------------------------------------------------------------------- the forger

test(
  "a forger off the path, who knows all but the secrets and writes any source address, changes nothing",
  LONG,
  () => {
    const { world, all, alice, bob, homes, talk, check, list } = village(5);
    const tools = dice("forger");
    const [mallory] = rogueCrowd(world, ["mallory"], alice);
    mallory!.say(like("GETALLUSER", { prefix: "", after: "" }));
    world.net.run(1_000);
    const users = mallory!.users;
    mallory!.say(like("LOGOUT", {}));
    world.net.run(1_000);

    const hits = watchVictim(world);
    let asked = 0;
    const started = world.net.now();
    const { server } = world;
    const serverEvents = server.events.length, clientEvents = all.map(({ process }) => process.events.length);
    const mine = keysFrom(tools.bytes(32));
    const endpoints = [...homes.values(), SERVER, "192.0.2.1:2281", `${VICTIM}:53`, `${VICTIM}:2280`];
    const id = () => tools.next() < 0.3 ? NO_ID : hex(tools.bytes(8));
    const people = [...users.values()];
    const messages = corpus.map(({ data }) => decode(data)).filter((message) => message !== null);
    const forge = (): Uint8Array => {
      const user = tools.pick(people), other = tools.pick(people), control = tools.pick(messages);
      switch (tools.below(6)) {
        case 0: // any message of the protocol, with what the forger knows in place of what he does not
          return encode({
            ...control,
            ...{
              name: user.name,
              to: user.name,
              from: user.name,
              peer: control.type === "PUNCHED" ? user.name : undefined,
            },
            ...("peer" in control && typeof control.peer === "object"
              ? { peer: { ...control.peer, ...user, candidates: [`${VICTIM}:53`] } }
              : {}),
            ...("users" in control ? { users: [{ ...user, key: mine.public, public: `${VICTIM}:53` }] } : {}),
            ...("local" in control ? { local: [`${VICTIM}:53`] } : {}),
            ...("key" in control ? { key: tools.pick([mine.public, user.key]) } : {}),
          } as ControlBody, {
            id: tools.next() < 0.3 ? user.nonce : id(),
            counter: Math.floor(tools.next() * 2 ** 48),
            key: tools.bytes(16),
          });
        case 1: { // a handshake in somebody's name, with the forger's keys
          const begun = initiate({
            own: mine,
            peer: user.key,
            psk: new Uint8Array(32),
            prologue: prologue(other, user),
            ephemeral: keysFrom(tools.bytes(32)),
          }, concat(tools.bytes(8), encodeInner(part(0, "forged"))))!;
          return encodeHandshake({ type: "P2PFIRST", from: 1, probe: 1, noise: begun.message });
        }
        case 2:
          return encodeHandshake({
            type: "P2PSECOND",
            to: tools.below(2 ** 32),
            from: 1,
            noise: tools.bytes(56),
            sealed: sealPeer(part(0, "forged"), { index: tools.below(2 ** 32), counter: 0, key: tools.bytes(32) }),
          });
        case 3:
          return sealPeer(tools.pick<Peer>([part(0, "forged"), { type: "P2PTRASH", probe: 1 }]), {
            index: tools.below(2 ** 32),
            counter: tools.below(2 ** 20),
            key: tools.bytes(32),
          });
        case 4: // with the nonce of a login for a token
          return encode(tools.pick<ControlBody>([like("LOGOUT", {}), like("KEEPALIVE", {})]), {
            id: user.nonce,
            counter: 2 ** 47,
            key: tools.bytes(16),
          });
        default: // who am I? The name is taken
          return encode(like("LOGIN", { cookie: id(), key: mine.public, name: user.name }), {
            id: id(),
            counter: 2 ** 47,
            key: tools.bytes(16),
          });
      }
    };
    for (let i = 0; i < 20_000; i++) {
      const data = forge(), from = tools.pick(endpoints), to = tools.pick([...homes.values(), SERVER]);
      if (hostOf(from) === hostOf(to)) continue;
      world.net.inject({ from, to, data });
      if (hostOf(from) === VICTIM) asked += data.length;
      if (i % 100 === 0) world.net.run(20);
    }
    world.net.run(1_000);
    assert.ok(hits.length > 100, "nobody was asked in the victim's name");
    for (const { data, from } of hits) assert.ok(mayAnswer(data, data), `${typeOf(data)} from ${from}`);
    assert.ok(hits.reduce((sum, { bytes }) => sum + bytes, 0) <= asked);
    assert.equal(world.server.events.length, serverEvents, "the server has seen something happen");
    all.forEach(({ process, name }, i) =>
      assert.deepEqual(
        process.events.slice(clientEvents[i]!).map(({ event }) => event),
        [],
        `${name} was told something`,
      )
    );
    talk();
    check();
    assert.deepEqual(new Map(list().map((user) => [user.name, user.public])), homes);
    assert.ok([alice, bob].every((player) => player.events("reconnecting").every(({ at }) => at < started)));
  },
);

// ---------------------------------------------------------------------------------------------------- the observer

/** Repeats all that was seen, to where it went and to the others, from where it came and in a third party's name. */
function replayAll({ world, seen, homes }: ReturnType<typeof village>): void {
  const copies = seen.slice();
  const elsewhere = [...homes.values()];
  for (const { from, to, data } of copies) {
    for (const source of [from, `${VICTIM}:53`, ...elsewhere.slice(0, 2), SERVER]) {
      if (hostOf(source) !== hostOf(to)) world.net.inject({ from: source, to, data });
    }
    for (const target of [...elsewhere, SERVER]) {
      if (hostOf(target) !== hostOf(from)) world.net.inject({ from, to: target, data });
    }
    world.net.run(1);
  }
  world.net.run(500);
}

/** Each copy in the third party's name, alone: how much larger is the answer? STUN's apart. */
function amplification({ world, seen }: ReturnType<typeof village>) {
  const worst = { ours: 0, stun: 0 };
  let answered = 0;
  const undo = world.net.tap(({ to, bytes }) => {
    if (hostOf(to) === VICTIM) answered += bytes;
  });
  const unique = new Map(seen.map((datagram) => [`${datagram.to} ${hex(datagram.data)}`, datagram]));
  for (const { to, data } of unique.values()) {
    answered = 0;
    world.net.inject({ from: `${VICTIM}:53`, to, data });
    world.net.run(2 * DELAY_MS);
    const whose = isStun(data) ? "stun" : "ours";
    worst[whose] = Math.max(worst[whose], answered / data.length);
  }
  undo();
  return worst;
}

test("an observer repeats every datagram: nothing twice, nobody out, nothing moved, nobody amplifies", LONG, () => {
  const place = village(6);
  const { world, all, homes, talk, check, list } = place;
  // At once, by what sees it pass.
  const undo = world.net.tap(({ host, from, to, data }) => {
    if (host === "") return;
    for (const source of [from, `${VICTIM}:53`]) world.net.inject({ from: source, to, data });
  });
  const hits = watchVictim(world);
  talk();
  undo();
  check();
  const quiet = () => {
    const server = world.server, events = server.events.length, told = all.map(({ process }) => process.events.length);
    return (what: string) => {
      assert.deepEqual(server.events.slice(events).map(({ event }) => event), [], `the server, ${what}`);
      all.forEach(({ process, name }, i) =>
        assert.deepEqual(process.events.slice(told[i]!).map(({ event }) => event), [], `${name}, ${what}`)
      );
    };
  };
  // Later.
  let still = quiet();
  replayAll(place);
  const worst = amplification(place);
  still("later");
  talk();
  check();
  // After the victim has logged in anew.
  const alice = join(world, "bert", { nat: "EIM+APDF random" });
  login(world, alice);
  alice.process.stop();
  world.net.run(70_000);
  login(world, join(world, "bert", { nat: "EIM+APDF random" }));
  still = quiet();
  replayAll(place);
  still("after a new login");
  // After the server's restart.
  world.restartServer();
  replayAll(place);
  world.net.run(30_000);
  still = quiet();
  replayAll(place);
  still("after the server's restart");
  talk();
  check();
  assert.deepEqual(
    new Map(list().filter(({ name }) => name !== "bert").map((user) => [user.name, user.public])),
    homes,
  );
  for (const { data } of hits) assert.ok(mayAnswer(data, data), `${typeOf(data)} to the third party`);
  const factors = `${worst.ours.toFixed(2)} times at most, STUN ${worst.stun.toFixed(2)} times`;
  console.log(`replays in a third party's name: ${hits.length} answers, amplified ${factors}`);
  assert.ok(worst.ours <= 1 && worst.stun <= 2.2);
});

test("an observer repeats the LOGIN of somebody who has left: nobody comes back by that, and the name is free", () => {
  const world = createWorld();
  const seen = observe(world);
  const erin = join(world, "erin", { nat: "EIM+APDF random" });
  login(world, erin);
  world.net.run(1_000);
  erin.command({ command: "exit" });
  world.net.run(1_000);
  for (const { from, to, data } of seen) world.net.inject({ from, to, data });
  world.net.run(1_000);
  const told = world.server.events.map(({ event }) => event.event);
  const again = join(world, "erin", { nat: "EIM+APDF random" });
  world.net.run(2_000);
  assert.deepEqual(again.events("error").map(({ code }) => code), []);
  assert.equal(again.events("login").length, 1);
  assert.deepEqual(told, ["login", "logout"]);
});

test("an observer's copies from elsewhere overtake the originals: no session traffic goes there, and nothing is lost", () => {
  const { world, all, homes, talk, check, list } = village(7);
  const hits = watchVictim(world);
  const tools = dice("race");
  let asked = 0;
  const undo = world.net.tap(({ host, from, to, data }) => {
    if (host === "" || hostOf(to) === VICTIM || tools.next() < 0.5) return;
    world.net.inject({ from: `${VICTIM}:53`, to, data });
    asked += data.length;
    const original = data.slice();
    world.net.after(60, () => world.net.inject({ from, to, data: original }));
    return "drop";
  });
  for (let i = 0; i < 5; i++) talk();
  undo();
  world.net.run(30_000);
  check();
  assert.ok(hits.length > 0);
  for (const { data } of hits) assert.ok(mayAnswer(data, data), `${typeOf(data)} to the third party`);
  assert.ok(hits.reduce((sum, { bytes }) => sum + bytes, 0) <= asked);
  assert.ok(!world.server.events.some(({ event }) => event.event === "moved" && hostOf(event.public) === VICTIM));
  assert.deepEqual(new Map(list().map((user) => [user.name, user.public])), homes);
  assert.ok(all.every((player) => player.events("reconnecting").length === 0));
});

test("an observer who passes the third party's COOKIE on to the client as well gets no more sent there than he sends", () => {
  const { world, homes, carol, dave, list } = village(8);
  const home = homes.get("carol")!;
  const hits = watchVictim(world);
  let asked = 0;
  const undo = world.net.tap(({ host, from, to, data }) => {
    if (hostOf(to) === VICTIM) return void world.net.inject({ from: SERVER, to: home, data });
    if (host === "" || from !== home || to !== SERVER) return;
    world.net.inject({ from: `${VICTIM}:53`, to, data });
    asked += data.length;
    const original = data.slice();
    world.net.after(60, () => world.net.inject({ from, to, data: original }));
    return "drop";
  });
  for (let i = 0; i < 50; i++) {
    dave.send("carol", `to carol ${i}`);
    if (i % 10 === 0) carol.send("dave", `to dave ${i}`);
    world.net.run(200);
  }
  undo();
  world.net.run(30_000);
  const bytes = hits.reduce((sum, { bytes }) => sum + bytes, 0);
  const session = hits.filter(({ data }) => typeOf(data) !== "COOKIE");
  console.log(
    `cookies passed on: ${session.length} datagrams of the session to the third party, ${bytes} B for ${asked} B`,
  );
  // Who rewrites addresses on the path is a NAT: that he can move an endpoint for as long as he goes on is the price of
  // roaming. It must end when he does, and nothing may be lost.
  assert.equal(texts(carol).filter((text) => text.startsWith("to carol")).length, 50);
  assert.equal(texts(dave).filter((text) => text.startsWith("to dave")).length, 5);
  assert.equal(list().find(({ name }) => name === "carol")!.public, home);
});

// ---------------------------------------------------------------------------------------------------- evil servers

/** A server that says something else than what its machine says, sealed with the right keys. */
interface Evil {
  /** Instead of this message to that user: others. */
  onSend: (message: Control, to: string) => ControlBody[];
  /** Before the machine hears it: another message, or none. */
  onHear: (message: Control, from: string) => ControlBody | null;
  /** Says something of its own. */
  tell(name: string, message: ControlBody): void;
  /** What a user's WELCOME said. */
  nonceOf(name: string): string;
}

function evil(world: World, keys: KeyPair): Evil {
  interface Prey {
    name: string;
    key: Uint8Array;
    macs: { toServer: Uint8Array; toClient: Uint8Array };
    at: Endpoint;
    nonce: string;
    sent: number;
  }
  const byToken = new Map<string, Prey>(), byName = new Map<string, Prey & { token: string }>();
  const logins = new Map<string, { name: string; key: Uint8Array }>();
  const sealFor = (token: string, message: ControlBody) => {
    const prey = byToken.get(token)!;
    return encode(message, { id: token, counter: ++prey.sent, key: prey.macs.toClient });
  };
  const self: Evil = {
    onSend: (message) => [message],
    onHear: (message) => message,
    tell(name, message) {
      const { token, at } = byName.get(name)!;
      world.server.perform([{ kind: "send", socket: 0, to: at, data: sealFor(token, message) }]);
    },
    nonceOf: (name) => byName.get(name)!.nonce,
  };
  takeOver(world, (server) => ({
    ...server,
    receive(datagram, now) {
      const message = decode(datagram.data);
      if (message?.type === "LOGIN") logins.set(message.id, { name: message.name, key: message.key });
      const prey = message && byToken.get(message.id);
      let heard: Datagram | null = datagram;
      if (prey && message.type !== "LOGIN") {
        const instead = self.onHear(message, prey.name);
        if (instead === null) heard = null;
        else if (instead !== message) {
          const data = encode(instead, { id: message.id, counter: message.counter, key: prey.macs.toServer });
          heard = { ...datagram, data };
        }
      }
      return heard === null ? [] : server.receive(heard, now).flatMap((effect) => {
        const said = effect.kind === "send" ? decode(effect.data) : null;
        if (effect.kind !== "send" || !said) return [effect];
        if (said.type === "WELCOME") {
          const { name, key } = logins.get(said.id)!;
          const macs = controlKeys(diffieHellman(keys.secret, key)!, said.token);
          const prey = { name, key, macs, at: effect.to, nonce: publicNonce(said.id), sent: said.counter };
          byToken.set(said.token, prey);
          byName.set(name, { ...prey, token: said.token });
          const [instead] = self.onSend(said, name);
          return [{ ...effect, data: encode(instead!, { id: said.id, counter: said.counter, key: macs.toClient }) }];
        }
        const to = byToken.get(said.id);
        if (!to) return [effect];
        return self.onSend(said, to.name).map((message) => ({ ...effect, data: sealFor(said.id, message) }));
      });
    },
  }));
  return self;
}

/** What a message says about users, changed. */
function rewrite(
  message: Control,
  change: (user: { name: string; nonce: string; key: Uint8Array }) => object,
): Control {
  if ("users" in message) {
    return { ...message, users: message.users.map((user) => ({ ...user, ...change(user) })) };
  }
  if ("peer" in message && typeof message.peer === "object") {
    return { ...message, peer: { ...message.peer, ...change(message.peer) } } as Control;
  }
  return message;
}

const PSK = Uint8Array.from({ length: 32 }, (_, i) => i);
const verifyCode = (player: Player) => player.events("verify").at(-1)?.code;

/**
 * Alice is at a server where a puppet passes for bob, bob at one where a puppet passes for alice; what a puppet hears,
 * the other one says. Nothing in it is forged: so it stays an attack however the protocol changes.
 */
function manInTheMiddle(seed: number, options: PlayerOptions, ofPuppets: PlayerOptions = {}) {
  const keys = keysFrom(dice(`evil ${seed}`).bytes(32));
  const world = createWorld({ seed, server: { keys } });
  const control = evil(world, keys);
  const second = world.net.host({ name: "second server", addresses: ["192.0.2.2"], delayMs: DELAY_MS });
  second.run(createServer({ keys: world.keys(), random: world.bytes }) as never, { ports: [2280, 2281] });
  const elsewhere = { servers: ["192.0.2.2:2280"] };
  const trueKeys = { alice: world.keys(), bob: world.keys() };
  const falseBob = join(world, "bob", ofPuppets);
  const falseAlice = join(world, "alice", { ...ofPuppets, ...elsewhere });
  login(world, falseBob, falseAlice);
  const alice = join(world, "alice", { keys: trueKeys.alice, ...options });
  const bob = join(world, "bob", { keys: trueKeys.bob, ...options, ...elsewhere });
  login(world, alice, bob);
  const read: string[] = [];
  const run = (ms: number) => {
    for (const end = world.net.now() + ms; world.net.now() < end; world.net.run(20)) {
      for (const [puppet, other] of [[falseBob, falseAlice], [falseAlice, falseBob]] as const) {
        const to = puppet === falseBob ? "bob" : "alice";
        for (const text of texts(puppet).slice(passed[to])) {
          passed[to]++;
          read.push(text);
          other.send(to, text);
        }
      }
    }
  };
  const passed = { alice: 0, bob: 0 };
  return { world, control, alice, bob, falseAlice, falseBob, trueKeys, read, run };
}

test("an evil server swaps the keys: without a secret it reads and writes, but `verify` differs on the two sides", () => {
  const { alice, bob, falseAlice, read, run } = manInTheMiddle(1, {});
  alice.send("bob", "for bob alone");
  run(3_000);
  falseAlice.send("bob", "forged");
  run(3_000);
  assert.deepEqual(texts(bob), ["for bob alone", "forged"]);
  assert.deepEqual(read, ["for bob alone"]);
  alice.command({ command: "verify", peer: "bob" });
  bob.command({ command: "verify", peer: "alice" });
  run(1_000);
  assert.match(verifyCode(alice)!, /^\d{5}( \d{5}){7}$/);
  assert.match(verifyCode(bob)!, /^\d{5}( \d{5}){7}$/);
  assert.notEqual(verifyCode(alice), verifyCode(bob));
});

test("an evil server swaps the keys: with a secret on both sides it reads nothing, and nothing of it is taken", () => {
  for (const guess of [undefined, new Uint8Array(32).fill(7)]) {
    const { alice, bob, falseAlice, falseBob, read, run } = manInTheMiddle(2, { psk: PSK }, { psk: guess });
    alice.send("bob", "for bob alone");
    bob.send("alice", "for alice alone");
    falseAlice.send("bob", "forged");
    falseBob.send("alice", "forged");
    run(40_000);
    assert.deepEqual(read, []);
    for (const player of [alice, bob]) {
      assert.deepEqual(texts(player), []);
      assert.deepEqual(player.events("sent").map(({ ok }) => ok), [false]);
      assert.ok(player.events("error").some(({ code }) => code === "untrusted"));
    }
  }
});

test("`verify` shows the key in use: a server that lists the true keys and introduces others is found out", () => {
  const { control, alice, bob, trueKeys, read, run } = manInTheMiddle(3, {});
  let listing = false;
  control.onSend = (message) => {
    if (listing && message.type === "USERS") {
      return [rewrite(message, ({ name }) => name === "bob" ? { key: trueKeys.bob.public } : {}) as ControlBody];
    }
    return [message as ControlBody];
  };
  alice.send("bob", "first");
  run(3_000);
  assert.deepEqual(texts(bob), ["first"]);
  listing = true;
  alice.command({ command: "verify", peer: "bob" });
  run(1_000);
  listing = false;
  // Bob is told by honest means what alice's key is: what he would read aloud.
  const honest = createWorld({ seed: 33 });
  const [a, b] = [join(honest, "alice", { keys: trueKeys.alice }), join(honest, "bob", { keys: trueKeys.bob })];
  login(honest, a, b);
  b.command({ command: "verify", peer: "alice" });
  honest.net.run(1_000);
  const codesAgree = verifyCode(alice) === verifyCode(b);
  const before = read.length;
  alice.send("bob", "after the codes were compared");
  run(20_000);
  assert.ok(!(codesAgree && read.length > before), "the codes agree, and the server reads on");
});

test("`verify` shows the key in use: a server that introduces the true key under the false one's login is found out", () => {
  const { control, alice, bob, falseBob, trueKeys, read, run } = manInTheMiddle(5, {});
  let introduction: ControlBody | undefined;
  control.onSend = (message, to) => {
    if (to === "alice" && message.type === "INTRODUCTION") introduction = message as ControlBody;
    return [message as ControlBody];
  };
  alice.send("bob", "first");
  run(3_000);
  assert.deepEqual(texts(bob), ["first"]);
  control.tell("alice", rewrite(introduction as Control, () => ({ key: trueKeys.bob.public })) as ControlBody);
  run(1_000);
  alice.command({ command: "verify", peer: "bob" });
  bob.command({ command: "verify", peer: "alice" });
  run(1_000);
  const honest = createWorld({ seed: 33 });
  const [a, b] = [join(honest, "alice", { keys: trueKeys.alice }), join(honest, "bob", { keys: trueKeys.bob })];
  login(honest, a, b);
  b.command({ command: "verify", peer: "alice" });
  honest.net.run(1_000);
  if (verifyCode(alice) !== verifyCode(b)) return;
  const before = read.length, heard = texts(alice).length;
  alice.send("bob", "after the codes were compared");
  falseBob.send("alice", "forged");
  run(20_000);
  assert.deepEqual(read.slice(before), []);
  assert.deepEqual(texts(alice).slice(heard), []);
});

test("nothing is taken from another key than the one that was verified", () => {
  const { control, alice, falseBob, trueKeys, run } = manInTheMiddle(6, {});
  let listing = true;
  control.onSend = (message) =>
    listing && message.type === "USERS"
      ? [rewrite(message, ({ name }) => name === "bob" ? { key: trueKeys.bob.public } : {}) as ControlBody]
      : [message as ControlBody];
  alice.command({ command: "verify", peer: "bob" });
  run(1_000);
  listing = false;
  assert.equal(alice.events("verify").length, 1);
  falseBob.send("alice", "forged");
  run(20_000);
  assert.deepEqual(texts(alice), []);
});

test("a key that was verified before the first message is the only one that counts from then on", () => {
  const { control, alice, trueKeys, read, run } = manInTheMiddle(4, {});
  let listing = true;
  control.onSend = (message) =>
    listing && message.type === "USERS"
      ? [
        rewrite(
          message,
          ({ name }) => name === "bob" ? { key: trueKeys.bob.public, nonce: "1".repeat(16) } : {},
        ) as ControlBody,
      ]
      : [message as ControlBody];
  alice.command({ command: "verify", peer: "bob" });
  run(1_000);
  listing = false;
  assert.equal(alice.events("verify").length, 1);
  alice.send("bob", "for the verified key alone");
  run(20_000);
  assert.deepEqual(read, []);
});

test("an evil server cannot have a user talk to himself: his own message does not come back as another's", () => {
  for (const psk of [undefined, PSK]) {
    const keys = keysFrom(dice("mirror").bytes(32)), own = keysFrom(dice("mirror alice").bytes(32));
    const world = createWorld({ server: { keys } });
    const control = evil(world, keys);
    login(world, join(world, "bob", { psk }));
    control.onSend = (message, to) =>
      to !== "alice" ? [message as ControlBody] : message.type === "INTRODUCTION" ? [] : [
        rewrite(message, ({ name }) => name === "bob" ? { key: own.public, nonce: ownNonce(message) } : {}) as never,
      ];
    const ownNonce = (message: Control) =>
      message.type === "WELCOME" ? publicNonce(message.id) : control.nonceOf("alice");
    control.onHear = (message, from) => {
      if (message.type !== "P2PTRANS" || from !== "alice") return message as ControlBody;
      const nonce = control.nonceOf("alice");
      if (message.body.length > 0) control.tell("alice", like("RELAYED", { from: "bob", nonce, body: message.body }));
      return null;
    };
    const alice = join(world, "alice", { psk, keys: own });
    login(world, alice);
    world.net.run(1_000);
    alice.send("bob", "to be or not to be");
    world.net.run(20_000);
    assert.deepEqual(texts(alice), []);
  }
});

test("an evil server cannot repeat a first message to a client that was started anew with the same key", () => {
  const keys = keysFrom(dice("again").bytes(32)), own = keysFrom(dice("again bob").bytes(32));
  const world = createWorld({ server: { keys } });
  const control = evil(world, keys);
  const recorded: ControlBody[] = [];
  control.onSend = (message, to) => {
    if (message.type === "P2PSOMEONEWANTTOCALLYOU" && to === "bob") recorded.push(message as ControlBody);
    return [message as ControlBody];
  };
  const options = { psk: PSK, keepName: true };
  const alice = join(world, "alice", options), bob = join(world, "bob", { ...options, keys: own });
  login(world, alice, bob);
  world.net.run(1_000);
  alice.send("bob", "pay 100");
  world.net.run(3_000);
  assert.deepEqual(texts(bob), ["pay 100"]);
  assert.ok(recorded.length > 0);
  bob.process.stop();
  const again = join(world, "bob", { ...options, keys: own, host: bob.host });
  login(world, again);
  for (const message of recorded) control.tell("bob", message);
  world.net.run(3_000);
  assert.deepEqual(texts(again), []);
});

test("an evil server repeats, reorders and doubles all that passes it: with a secret, nothing arrives twice", () => {
  const keys = keysFrom(dice("doubles").bytes(32));
  const world = createWorld({ server: { keys } });
  const control = evil(world, keys);
  const bodies: { to: string; message: ControlBody }[] = [];
  control.onSend = (message, to) => {
    if (message.type !== "RELAYED" && message.type !== "P2PSOMEONEWANTTOCALLYOU") return [message as ControlBody];
    bodies.push({ to, message: message as ControlBody });
    return [message as ControlBody, message as ControlBody];
  };
  const options = { psk: PSK, direct: false };
  const alice = join(world, "alice", options), bob = join(world, "bob", options);
  login(world, alice, bob);
  for (let i = 0; i < 20; i++) {
    alice.send("bob", `m ${i}`);
    bob.send("alice", `m ${i}`);
    world.net.run(300);
    if (i % 5 === 0) { for (const { to, message } of bodies.slice().reverse()) control.tell(to, message); }
  }
  world.net.run(5_000);
  const expected = numbered(20, "m ");
  assert.deepEqual(texts(alice), expected);
  assert.deepEqual(texts(bob), expected);
});

test("an evil server exchanges two users who share one secret: what is for bob is not shown to carol as hers", () => {
  const keys = keysFrom(dice("swap").bytes(32));
  const world = createWorld({ server: { keys } });
  const control = evil(world, keys);
  const [bob, carol] = [join(world, "bob", { psk: PSK }), join(world, "carol", { psk: PSK })];
  login(world, bob, carol);
  const listed = new Map<string, User>();
  const swap: Record<string, string> = { bob: "carol", carol: "bob" };
  control.onSend = (message, to) => {
    if (to !== "alice") return [message as ControlBody];
    if ("users" in message) { for (const user of message.users) listed.set(user.name, user); }
    return [rewrite(message, ({ name }) => {
      const other = listed.get(swap[name] ?? "");
      return other ? { key: other.key, nonce: other.nonce } : {};
    }) as ControlBody];
  };
  control.onHear = (message, from) =>
    (message.type === "P2PTRANS" && from === "alice"
      ? { ...message, to: swap[message.to] ?? message.to }
      : message) as ControlBody;
  const alice = join(world, "alice", { psk: PSK });
  login(world, alice);
  world.net.run(1_000);
  alice.send("bob", "for bob alone");
  world.net.run(20_000);
  assert.deepEqual(texts(carol), []);
});

/** Punches of one introduction to one endpoint, and endpoints in one introduction (client.ts, protocol.ts). */
const PUNCHES = 14, ENDPOINTS = 16;

test(
  "an evil server aims a client at a third party: so many datagrams at most for an introduction, and for all",
  LONG,
  () => {
    const keys = keysFrom(dice("aim").bytes(32));
    const aimed = Array.from({ length: ENDPOINTS }, (_, i) => `${VICTIM}:${1_000 + i}`);
    const results: Record<string, { introductions: number; seconds: number; datagrams: number }> = {};
    const scene = () => {
      const world = createWorld({ server: { keys, maxPerAddress: 5_000 } });
      const control = evil(world, keys);
      control.onSend = (message, to) =>
        to !== "alice" || !("peer" in message) || typeof message.peer !== "object"
          ? [message as ControlBody]
          : [rewrite(message, () => ({ candidates: aimed })) as ControlBody];
      return { world, control, hits: watchVictim(world) };
    };
    { // one introduction
      const { world, hits } = scene();
      const alice = join(world, "alice"), bob = join(world, "bob", { direct: false });
      login(world, alice, bob);
      world.net.run(500);
      alice.send("bob", "hi");
      world.net.run(1_900); // the next one is asked for 2 s after the first has failed
      results["one"] = { introductions: 1, seconds: 1.9, datagrams: hits.length };
      assert.ok(hits.length > 0 && hits.length <= PUNCHES * ENDPOINTS);
    }
    { // as many as the server likes
      const { world, control, hits } = scene();
      let introduction: ControlBody | undefined;
      const { onSend } = control;
      control.onSend = (message, to) => {
        const [instead] = onSend(message, to);
        if (to === "alice" && instead?.type === "INTRODUCTION") introduction = instead;
        return [instead!];
      };
      const alice = join(world, "alice"), bob = join(world, "bob", { direct: false });
      login(world, alice, bob);
      world.net.run(500);
      alice.send("bob", "hi");
      world.net.run(1_000);
      const before = hits.length;
      let told = 0; // the server, by alice: at each introduction that she heeds, that she punches
      world.net.trace = ({ fate, host, to }) => void (fate === "sent" && host === "alice" && to === SERVER && told++);
      for (let i = 0; i < 1_000; i++) {
        control.tell("alice", introduction!);
        world.net.run(10);
      }
      results["one peer, 100 a second"] = { introductions: 1_000, seconds: 10, datagrams: hits.length - before };
      // 20 at once and 5 a second, of which each begins the schedule anew.
      assert.ok(told <= 20 + 5 * 10 + 30, `${told} datagrams to the server`);
      assert.ok(hits.length - before <= (20 + 5 * 10) * PUNCHES * ENDPOINTS / 2);
    }
    { // peers that do not exist
      const { world, hits } = scene();
      const alice = join(world, "alice");
      login(world, alice);
      const crowd = rogueCrowd(world, numbered(300, "fake-"), alice);
      hits.length = 0;
      for (const each of crowd) each.open("alice", { type: "P2PTRASH", probe: 1 });
      world.net.run(10_000);
      results["300 peers, one each"] = { introductions: 300, seconds: 10, datagrams: hits.length };
    }
    { // the peer is behind a NAT that only a spray can pass
      const { world, hits } = scene();
      const alice = join(world, "alice", { nat: "EIM+APDF random" });
      const bob = join(world, "bob", { nat: "APDM+APDF random" });
      login(world, alice, bob);
      world.net.run(5_000);
      alice.send("bob", "hi");
      world.net.run(30_000);
      results["one peer, behind a symmetric NAT"] = { introductions: 1, seconds: 30, datagrams: hits.length };
      assert.ok(hits.length <= 2 * 2_048 + 10 * PUNCHES * ENDPOINTS);
    }
    console.table(results);
    // A client is no flood: what it sends to one third party in 10 s stays under what one spray may send (DESIGN 4).
    assert.ok(results["300 peers, one each"]!.datagrams <= 10 * 2_048, "introductions make a flood");
  },
);

// ---------------------------------------------------------------------------------------------------- rogues

/** Hands a datagram to the client itself, and tells what it wants done. */
function feed({ client, process }: Player, world: World, from: Endpoint, data: Uint8Array) {
  const effects = client.receive({ socket: 0, from, data }, world.net.now());
  process.perform(effects);
  return effects;
}

/** How many sockets a client asks for from now on. */
function countSockets({ client }: Player) {
  const open = new Set<number>(), count = { opened: 0, most: 0, open };
  const watch = <E>(effects: Effect<E>[]): Effect<E>[] => {
    for (const effect of effects) {
      if (effect.kind === "close") open.delete(effect.socket);
      if (effect.kind !== "open") continue;
      open.add(effect.socket);
      count.opened++;
      count.most = Math.max(count.most, open.size);
    }
    return effects;
  };
  const { receive, wake, opened } = client;
  client.receive = (datagram, now) => watch(receive(datagram, now));
  client.wake = (now) => watch(wake(now));
  client.opened = (socket, port, now) => watch(opened(socket, port, now));
  return count;
}

/** The village, and a rogue that has a session with alice. */
function infiltrated(seed: number) {
  const place = village(seed);
  const { world, alice } = place;
  const [mallory] = rogueCrowd(world, ["mallory"], alice) as [Rogue];
  mallory.open("alice", { type: "P2PTRASH", probe: 1 });
  world.net.run(1_000);
  assert.ok(mallory.isOpen());
  return { ...place, mallory };
}

const STREAMS: Record<string, (i: number) => Peer> = {
  "parts without bytes, never the last": (i) => part(i, NO_BYTES, { left: 65_535 }),
  "parts of one byte, never the last": (i) => part(i, "x", { left: 65_535 }),
  "full parts, never the last": (i) => part(i, new Uint8Array(800), { left: 65_535 }),
  "every other part": (i) => part(2 * i + 1, "x", { base: i }),
  "numbers far ahead": (i) => part(2 ** 32 - 1 - i, "x", { left: i & 0xffff }),
  "parts that were delivered before": (i) => i % 2 === 1 ? part((i + 1) / 2, "x") : part(i / 2, new Uint8Array(800)),
  "a base that jumps": (i) => part(100_000 * i % 2 ** 32, "x", { base: 100_000 * i % 2 ** 32, left: 1 }),
  "a base that jumps back": (i) => part(2 ** 31 - 100 * i, "x", { base: 2 ** 31 - 100 * i, left: 1 }),
  "a base after its part": (i) => part(i, "x", { base: i + 1 }),
  "parts that are too long": (i) => part(i, new Uint8Array(1_100), { left: 1 }),
  "wrong numbers of parts left": (i) => part(i, new Uint8Array(400), { left: (7 * i) % 5 + 1 }),
};

for (const [what, frameOf] of Object.entries(STREAMS)) {
  test(`a peer sends ${what}: no memory is held for it, and the others are not disturbed`, () => {
    const { world, alice, mallory, talk, check } = infiltrated(9);
    // What alice answers is left out: 20,000 datagrams under way at one instant would be the memory that is measured.
    const hear = (frame: Peer) =>
      alice.client.receive({ socket: 0, from: mallory.at, data: mallory.sealed(frame) }, world.net.now());
    hear(part(0, "hello"));
    const before = memory();
    for (let i = 1; i <= 20_000; i++) hear(frameOf(i));
    const grown = memory() - before;
    assert.ok(grown < 1.5 * MIB, `${(grown / MIB).toFixed(1)} MiB`);
    mallory.relay(
      mallory.sealed({ type: "P2PMESSAGEACK", next: 2 ** 32 - 1, from: 2 ** 31, states: new Uint8Array(999) }),
    );
    world.net.run(1_000);
    alice.process.events.splice(
      0,
      Infinity,
      ...alice.process.events.filter(({ event }) => event.event !== "message" || event.from !== "mallory"),
    );
    talk();
    check();
  });
}

test("a peer's counters: none counts twice, none from behind the window, and one far ahead harms only him", () => {
  const { world, alice, mallory, talk, check } = infiltrated(10);
  const echoes = (counter: number) => {
    const data = mallory.sealed({ type: "P2PTRASH", probe: 7 }, counter);
    return sends(feed(alice, world, mallory.at, data)).filter(({ data }) => mallory.frameOf(data)?.type === "P2PECHO")
      .length;
  };
  assert.deepEqual([5_000, 5_000, 4_999, 4_999, 5_000 - 2_048, 3_000].map(echoes), [1, 0, 1, 0, 0, 1]);
  assert.deepEqual([2 ** 48 - 1, 2 ** 48 - 1, 6_000, 2 ** 48 - 2].map(echoes), [1, 0, 0, 1]);
  talk();
  check();
});

test("a peer comes from thousands of ports of his host: a bounded number of them is remembered", LONG, () => {
  const { world, alice, mallory, talk, check } = infiltrated(11);
  const host = hostOf(mallory.at), PORTS = 5_000;
  for (let port = 10_000; port < 10_000 + PORTS; port++) {
    const from = formatEndpoint(host, port);
    const answers = sends(feed(alice, world, from, mallory.sealed({ type: "P2PTRASH", probe: port })));
    assert.ok(answers.length <= 2 && answers.every(({ to }) => to === from));
    world.net.run(5);
  }
  // Called again, and told that the peer has punched, alice tries all the ways that she has not given up.
  mallory.say(like("P2PTRANS", { to: "alice", nonce: mallory.users.get("alice")!.nonce, call: 1, body: NO_BYTES }));
  world.net.run(R);
  const tried = new Set<Endpoint>();
  world.net.trace = ({ fate, host: sender, to }) =>
    void (fate === "sent" && sender === "alice" && hostOf(to) === host && tried.add(to));
  mallory.say(like("PUNCHED", { peer: "alice" }));
  world.net.run(R);
  console.log(`a peer with ${PORTS} ports: ${tried.size} are remembered`);
  assert.ok(tried.size > 0 && tried.size <= 64, `${tried.size}`);
  world.net.run(10_000);
  talk();
  check();
});

for (const victim of ["alice", "carol"] as const) {
  test(
    `a peer tells ${victim} one plan for harder NATs after another: sockets and datagrams have a limit`,
    LONG,
    () => {
      const place = village(16), { world } = place, player = place[victim];
      const [mallory] = rogueCrowd(world, ["mallory"], player) as [Rogue];
      mallory.open(victim, { type: "P2PTRASH", probe: 1 });
      world.net.run(30_000);
      const sockets = countSockets(player);
      let sent = 0;
      world.net.trace = ({ fate, host, to }) =>
        void (fate === "sent" && host === victim && hostOf(to) === hostOf(mallory.at) && sent++);
      const ports = Array.from({ length: 64 }, (_, i) => 20_000 + i);
      for (let i = 0; i < 1_000; i++) {
        const plan: Peer = { type: "P2PPLAN", attempt: [0, 1, 2, 3, 4, 5, 100, 101, 255][i % 9]!, spray: i & 1, ports };
        feed(player, world, mallory.at, mallory.sealed(plan));
        world.net.run(10);
      }
      console.log(
        `1,000 plans in 10 s for ${victim}: ${sockets.opened} sockets, ${sockets.most} at a time, ${sent} datagrams`,
      );
      // Two rounds' sockets, and one spray and what is swept around it.
      assert.ok(
        sockets.most <= 2 * 256 && sockets.opened <= 8 * 256,
        `${sockets.opened} sockets, ${sockets.most} at once`,
      );
      assert.ok(sent <= 3 * 2_048, `${sent} datagrams`);
      world.net.run(30_000);
      place.talk();
      place.check();
    },
  );
}

test(
  "many call somebody behind a symmetric NAT at the same time: the sockets that this takes have a limit",
  LONG,
  () => {
    const { world, carol } = village(17);
    const crowd = rogueCrowd(world, numbered(40, "caller-"), carol);
    const sockets = countSockets(carol);
    for (const each of crowd) each.open("carol", { type: "P2PTRASH", probe: 1 });
    world.net.run(10_000);
    console.log(`40 callers: ${sockets.most} sockets at a time`);
    assert.ok(sockets.most > 0 && sockets.most <= 1_024, `${sockets.most} sockets at a time`);
  },
);

test("a peer begins one handshake after another: 20 are answered, and 5 a second from then on", () => {
  const { world, mallory, talk, check } = infiltrated(12);
  world.net.run(10_000);
  mallory.heard.length = 0;
  for (let i = 0; i < 90; i++) { // as many as the server passes on at once
    mallory.open("alice", { type: "P2PTRASH", probe: 1 });
    world.net.run(10);
  }
  world.net.run(1_000);
  const seconds = new Set(
    mallory.heard.map(({ data }) => decode(data)).flatMap((message) =>
      message?.type === "RELAYED" && typeOf(message.body) === "P2PSECOND" ? [hex(message.body.subarray(6, 68))] : []
    ),
  );
  assert.ok(seconds.size >= 20 && seconds.size <= 30, `${seconds.size}`);
  world.net.run(5_000);
  talk();
  check();
});

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
    crowd.forEach((each, i) => each.open("alice", i < 50 ? { type: "P2PTRASH", probe: 1 } : part(0, "buy!")));
    world.net.run(3_000);
    alice.command({ command: "path", peer: null });
    const conversations = new Set(alice.events("path").map(({ peer }) => peer));
    console.log(`1,100 callers: ${conversations.size} conversations, ${((memory() - before) / MIB).toFixed(1)} MiB`);
    assert.ok(conversations.size <= 1_001 + 2);
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

test("a user has the server pass on as many bytes as fit into a datagram, under the longest name: no exception", () => {
  const tools = dice("giant");
  const server = createServer({ keys: keysFrom(tools.bytes(32)), random: tools.bytes });
  const longest = "n".repeat(32), now = 1_000_000;
  const from = "100.64.1.1:1000";
  const giant = enter(server, hand(longest, tools), { from, now })!;
  const target = enter(server, hand("z", tools), { from: "100.64.1.2:1000", now })!;
  const local = Array.from({ length: 8 }, (_, i) => `[fd00::${i + 1}]:${60_000 + i}`);
  giant.say(giant.seal(like("KEEPALIVE", { cookie: NO_ID, local })));
  for (const call of [0, 1]) {
    for (let size = 0; size <= 1_170; size += size < 700 ? 100 : 1) {
      let question: Uint8Array;
      try {
        question = giant.seal(like("P2PTRANS", { to: "z", nonce: target.nonce, call, body: new Uint8Array(size) }));
      } catch {
        break; // does not fit into the question either
      }
      const at = now + 3_600_000 * call + 10_000 * size; // the bucket is full again
      const effects = server.receive({ socket: 0, from, data: question }, at);
      assert.ok(sends(effects).every(({ data }) => data.length <= MAX_DATAGRAM_BYTES));
    }
  }
  for (const text of ["x".repeat(255), "\u{1f600}".repeat(63)]) {
    for (
      const message of [
        like("P2PTRANS", { to: text, nonce: NO_ID, call: 1, body: NO_BYTES }),
        like("GETALLUSER", { prefix: text, after: text }),
        like("PUNCHED", { peer: text }),
      ]
    ) giant.say(giant.seal(message));
  }
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

test("a client whose server does not answer says so after ten seconds, and is idle in between", () => {
  const world = createWorld();
  world.server.stop();
  const alice = join(world, "alice"), started = world.net.now();
  world.net.run(30_000);
  assert.deepEqual(alice.events("error").map(({ code, at }) => [code, at - started]), [["unreachable", 10_000]]);
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

// ---------------------------------------------------------------------------------------------------- limits

/** A server at rest, and a way in. */
function office(options: Partial<Parameters<typeof createServer>[0]> = {}) {
  const tools = dice("office"), keys = keysFrom(tools.bytes(32));
  const server = createServer({ keys: keysFrom(tools.bytes(32)), random: tools.bytes, ...options });
  const now = 1_700_000_000_000;
  const come = (name: string, from: Endpoint, at = now) =>
    enter(server, hand(name, tools, { keys }), { from, now: at });
  return { server, tools, now, come };
}
const types = (effects: Effect<unknown>[]) => sends(effects).map(({ data }) => decode(data)!.type);
const reasonOf = (effects: Effect<unknown>[]) => {
  const message = sends(effects).map(({ data }) => decode(data)!).find(({ type }) => type === "ERROR");
  return message?.type === "ERROR" ? message.reason : undefined;
};

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

test("a LOGIN that was held back on its way does not bring back who has logged in again and left", () => {
  const { server, tools, now } = office();
  const from = "100.64.1.1:1", keys = keysFrom(tools.bytes(32)), first = hand("alice", tools, { keys, clock: 1 });
  const say = (data: Uint8Array, at: number) => server.receive({ socket: 0, from, data }, at);
  const [cookie] = sends(say(first.hello(), now));
  const heldBack = first.answer(cookie!.data)!.slice();
  const second = enter(server, hand("alice", tools, { keys, clock: 2 }), { from, now: now + 1_000 })!;
  assert.equal(reasonOf(say(heldBack, now + 2_000)), "name-taken");
  second.say(second.seal(like("LOGOUT", {})), now + 3_000);
  assert.equal(reasonOf(say(heldBack, now + 4_000)), "name-taken");
});

test("a LOGIN is not taken a second time, even if others have had the name meanwhile", () => {
  const { server, tools, come, now } = office();
  const from = "100.64.1.1:1", alice = hand("alice", tools, { keepName: 1 });
  const say = (data: Uint8Array, at: number) => server.receive({ socket: 0, from, data }, at);
  const [cookie] = sends(say(alice.hello(), now));
  const login = alice.answer(cookie!.data)!.slice();
  for (const { data } of sends(say(login, now))) alice.answer(data);
  say(alice.seal(like("LOGOUT", {})), now + 1_000);
  const other = come("alice", "100.64.7.7:1", now + 2_000)!;
  other.say(other.seal(like("LOGOUT", {})), now + 3_000);
  assert.equal(reasonOf(say(login, now + 4_000)), "name-taken");
  assert.ok(enter(server, hand("alice", tools), { from: "100.64.8.8:1", now: now + 5_000 })); // nobody holds it
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

test("a forger who is a user sees the nonce of a login whose WELCOME is lost, and still cannot pass for the server", () => {
  for (const skewMs of [0, 300, -300]) {
    const world = createWorld({ seed: 3 });
    const mallory = join(world, "mallory");
    login(world, mallory);
    world.net.run(2_000);
    let isLost = false;
    world.net.tap(({ host, data }) => {
      if (!isLost && host === "server" && decode(data)?.type === "WELCOME") return isLost = true, "drop";
    });
    const own = world.keys(), token = "00000000000000aa";
    const { receive } = mallory.client;
    let forged = 0;
    mallory.client.receive = (datagram, now) => { // her own client hears it, and she reads along
      const message = decode(datagram.data);
      const alice = message?.type === "USERS" ? message.users.find(({ name }) => name === "alice") : undefined;
      if (alice && forged === 0) {
        const macs = controlKeys(diffieHellman(own.secret, alice.key)!, token);
        const put = (data: Uint8Array) => world.net.inject({ from: SERVER, to: alice.public, data });
        const cookie = like("COOKIE", { cookie: "1".repeat(16), key: own.public, known: 0 });
        for (let counter = Math.floor(now) - 800; counter < now + 400; counter++, forged++) {
          put(encode(cookie, { id: alice.nonce, counter }));
        }
        const welcome = like("WELCOME", {
          token,
          public: alice.public,
          secondPort: 1,
          thirdPort: 1,
          total: 1,
          users: [],
        });
        world.net.after(1, () => put(encode(welcome, { id: alice.nonce, counter: 1, key: macs.toClient })));
      }
      return receive(datagram, now);
    };
    const alice = join(world, "alice");
    alice.jump(skewMs);
    world.net.run(10_000);
    assert.ok(forged > 1_000);
    assert.deepEqual(
      alice.process.events.map(({ event }) => event.event).filter((event) => event !== "users"),
      ["login"],
    );
    mallory.send("alice", "hi");
    world.net.run(2_000);
    assert.deepEqual(texts(alice), ["hi"]);
  }
});

test("a LOGIN that is replayed from where its client has been does not take the session back there", () => {
  for (let seed = 0; seed < 20; seed++) {
    const world = createWorld({ seed });
    const alice = join(world, "alice", { nat: "EIM+APDF random" }),
      bob = join(world, "bob", { nat: "EIM+APDF random" });
    let copy: { from: Endpoint; to: Endpoint; data: Uint8Array } | null = null;
    const untap = world.net.tap(({ from, to, data }) => {
      const message = decode(data);
      if (message?.type !== "LOGIN" || message.name !== "alice" || message.cookie === NO_ID) return;
      copy = { from, to, data: data.slice() };
    });
    login(world, alice, bob);
    untap();
    world.net.run(500);
    alice.nat!.readdress("198.18.7.7");
    world.net.run(22_000);
    world.net.inject(copy!);
    world.net.run(100 + 10 * seed);
    bob.send("alice", "are you there?");
    world.net.run(2_000);
    assert.deepEqual(texts(alice), ["are you there?"], `seed ${seed}`);
  }
});

test("a network that flaps, or a server that says it does, has a client open a few sockets at a time, and close them", () => {
  const world = createWorld();
  const alice = join(world, "alice", { nat: "EIM+APDF random" });
  login(world, alice);
  world.net.run(5_000);
  let open = 0, most = 0;
  const { client } = alice;
  for (const name of ["receive", "wake", "opened", "interfaces"] as const) {
    const original = client[name] as (...args: unknown[]) => Effect[];
    (client[name] as unknown) = (...args: unknown[]) => {
      const effects = original(...args);
      for (const { kind } of effects) open += Number(kind === "open") - Number(kind === "close");
      most = Math.max(most, open);
      return effects;
    };
  }
  const [home] = alice.nat!.addresses;
  for (let i = 0; i < 60; i++) {
    alice.nat!.readdress(i % 2 ? home! : "198.18.7.7");
    alice.process.call((now) => client.interfaces([`192.168.9.${i}`], now));
    world.net.run(330);
  }
  world.net.run(60_000);
  assert.equal(open, 0);
  assert.ok(most > 0 && most < 10, `${most} at a time`);
});

test("limit: a name that is held is not freed by 10,000 names that come and go", LONG, () => {
  const { server, tools, come, now } = office();
  const alice = (from: Endpoint, at: number) => enter(server, hand("alice", tools, { keepName: 1 }), { from, now: at }); // with other keys each time
  assert.ok(alice("100.64.1.1:1", now));
  server.wake(now + 60_000);
  const later = now + 61_000;
  assert.equal(alice("100.64.1.2:1", later), null);
  for (let i = 0; i < 10_001; i++) {
    const user = come(`user-${i}`, `100.${64 + (i >> 10)}.2.1:1`, later + i)!;
    server.receive({ socket: 0, from: user.from, data: user.seal(like("LOGOUT", {})) }, later + i);
  }
  assert.equal(alice("100.64.1.3:1", later + 10_001), null);
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

test("limit: names that were here, the last 10,000 for an hour", LONG, () => {
  const { server, come, now } = office();
  const asker = come("asker", "100.127.0.1:1")!;
  const status = (name: string, at: number) =>
    reasonOf(asker.say(asker.seal(like("P2PTRANS", { to: name, nonce: NO_ID, call: 0, body: NO_BYTES })), at));
  for (let i = 0; i < 10_001; i++) {
    const user = come(`user-${i}`, `100.${64 + (i >> 10)}.1.1:1`, now + i)!;
    user.say(user.seal(like("LOGOUT", {})), now + i);
  }
  const full = now + 10_001;
  assert.deepEqual([0, 1, 10_000].map((i) => status(`user-${i}`, full)), ["unknown", "offline", "offline"]);
  for (let at = full; at <= full + 3_601_000; at += 10_000) { // the asker stays
    asker.say(asker.seal(like("KEEPALIVE", { cookie: NO_ID, local: [] })), at);
    server.wake(at);
  }
  assert.equal(status("user-10000", full + 3_602_000), "unknown");
});

test("sixty who call four times a second each keep nobody from writing to others, or others to him", LONG, () => {
  const bodies: Record<string, (bytes: (length: number) => Uint8Array) => Uint8Array> = {
    nothing: () => NO_BYTES,
    "a first message": (bytes) => encodeHandshake({ type: "P2PFIRST", from: 1, probe: 0, noise: bytes(65) }),
    "something sealed": (bytes) => concat(Uint8Array.of(MAGIC, 100), bytes(60)),
  };
  for (const [what, bodyOf] of Object.entries(bodies)) {
    const world = createWorld({ seed: 11 }), tools = dice(`calls ${what}`);
    const [bob, carol, dora] = ["bob", "carol", "dora"].map((name) => join(world, name, { nat: "EIM+APDF random" }));
    login(world, bob!, carol!, dora!);
    world.net.run(3_000);
    const crowd = rogueCrowd(world, numbered(60, "m"), bob!);
    let calls = 0;
    world.net.tap(({ host, data }) => {
      const message = host === "bob" ? decode(data) : null;
      if (message?.type === "P2PTRANS") calls += message.call;
    });
    const flood = (ms: number) => {
      for (let t = 0, i = 0; t < ms; t += 4, i++) {
        const each = crowd[i % 60]!, { nonce } = each.users.get("bob")!;
        each.say(like("P2PTRANS", { to: "bob", nonce, call: 1, body: bodyOf(tools.bytes) }));
        world.net.run(4);
      }
    };
    flood(2_000);
    bob!.send("carol", "to carol");
    flood(5_000);
    dora!.send("bob", "to bob");
    flood(5_000);
    for (const player of [bob!, dora!]) {
      const { ok, ms } = player.events("sent")[0]!;
      assert.ok(ok && ms < 1_000, `${player.name} among calls with ${what}: ${ok}, ${ms} ms`);
      assert.equal(player.path(), "direct");
    }
    const notices = bob!.events("error").length;
    assert.ok(notices <= 20, `${notices} notices of calls with ${what}`);
    assert.ok(calls <= 2, `${calls} calls of his own, to answer those with ${what}`);
  }
});

test("a stranger's datagram costs a client as little as before when it knows 300 people", LONG, () => {
  const world = createWorld({ seed: 9 });
  const alice = join(world, "alice");
  login(world, alice);
  for (const each of rogueCrowd(world, numbered(300, "m"), alice)) each.open("alice", part(0, "hi"));
  world.net.run(3_000);
  const { client } = alice, now = world.net.now(), data = new Uint8Array(20).fill(9);
  const millisecondsFor = (count: number) => {
    const begun = performance.now();
    for (let i = 0; i < count; i++) {
      client.receive({ socket: 0, from: "198.18.0.1:53", data }, now);
      client.wakeAt();
    }
    return performance.now() - begun;
  };
  millisecondsFor(1_000);
  const ms = millisecondsFor(10_000);
  assert.ok(ms < 40, `${ms} ms for 10,000`);
});

test("copies of a first message in the name of other ports draw fewer bytes from a client than they bring", () => {
  const world = createWorld({ seed: 3 });
  const alice = join(world, "alice", { nat: "EIM+APDF random" });
  login(world, alice);
  const seen = observe(world), [mallory] = rogueCrowd(world, ["mallory"], alice) as [Rogue];
  mallory.open("alice", { type: "P2PTRASH", probe: 1 });
  world.net.run(20_000);
  const calls = seen.filter(({ from }) => from === mallory.at).map(({ data }) => decode(data));
  const call = calls.findLast((message) => message?.type === "P2PTRANS" && message.body.length > 0);
  const { noise } = decodeHandshake((call as Control & { type: "P2PTRANS" }).body) as Handshake & { type: "P2PFIRST" };
  const data = encodeHandshake({ type: "P2PFIRST", from: 0, probe: 0, noise: noise.subarray(0, 32) });
  let answers = 0, bytes = 0;
  for (let i = 0; i < 20_000; i++) {
    const from = `${hostOf(mallory.at)}:${1_024 + i}`;
    for (const answer of sends(alice.client.receive({ socket: 0, from, data }, world.net.now()))) {
      answers++;
      bytes += answer.data.length;
    }
  }
  assert.ok(answers > 0 && answers <= 300 && bytes < 20_000 * data.length / 10, `${answers} answers, ${bytes} bytes`);
});

test(
  "a peer who floods a client with punches uses up nobody else's, and one who comes and goes leaves no sockets",
  LONG,
  () => {
    const world = createWorld({ seed: 12 });
    const [alice, bob] = ["alice", "bob"].map((name) => join(world, name, { nat: "EIM+APDF random" })) as [
      Player,
      Player,
    ];
    login(world, alice, bob);
    world.net.run(5_000);
    const sockets = countSockets(bob), [mallory] = rogueCrowd(world, ["mallory"], bob) as [Rogue];
    const echoes: { at: number; to: Endpoint; probe: number }[] = [];
    let main = "";
    mallory.onFrame = (frame, from) => { // quick at bob's first socket, slow at any other
      const at = world.net.now() + (from === main ? 20 : 80);
      if (frame.type === "P2PTRASH" && from !== SERVER) echoes.push({ at, to: from, probe: frame.probe });
      return null;
    };
    const run = (ms: number) => {
      for (let t = 0; t < ms; t += 10) {
        world.net.run(10);
        for (const echo of echoes.splice(0)) {
          if (echo.at > world.net.now()) echoes.push(echo);
          else mallory.write(echo.to, mallory.sealed({ type: "P2PECHO", probe: echo.probe }));
        }
      }
    };
    const punch = (probe: number) => mallory.sealed({ type: "P2PTRASH", probe });
    mallory.open("bob", part(0, "hi"));
    run(300);
    const heard = mallory.heard.map(({ data }) => decode(data)).findLast((message) => message?.type === "INTRODUCTION");
    main = (heard as Control & { type: "INTRODUCTION" }).peer.candidates[0]!;
    run(3_000);
    for (let round = 0; round < 5; round++) {
      run(11_000);
      mallory.relay(mallory.sealed(part(round + 1, "still here")));
      // A renewal: bob takes a fresh socket. Then the first path is quicker again, and the other one is crowded out.
      mallory.relay(
        mallory.sealed({ type: "P2PPLAN", attempt: 100, spray: 0, ports: [Number(mallory.at.split(":")[1])] }),
      );
      run(3_000);
      for (let i = 0; i < 20; i++) {
        mallory.write(main, punch(i));
        run(60);
      }
      for (let port = 0; port < 40; port++) {
        feed(bob, world, `${hostOf(mallory.at)}:${5_000 + 40 * round + port}`, punch(port));
        run(10);
      }
      run(2_000);
    }
    assert.ok(
      sockets.opened >= 5 && sockets.open.size === 0,
      `${sockets.open.size} of ${sockets.opened} sockets are open`,
    );
    for (let i = 0; i < 40_000; i++) {
      feed(bob, world, `${hostOf(mallory.at)}:${20_000 + i}`, punch(i));
      if (i === 10_000) alice.send("bob", "hi");
      if (i % 10 === 0) world.net.run(1); // 10,000 a second
    }
    assert.equal(alice.path(), "direct");
    assert.ok(alice.events("path")[0]!.ms < 1_000, `${alice.events("path")[0]!.ms} ms`);
  },
);

// ---------------------------------------------------------------------------------------------------- many

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
    let count = 0;
    couples.forEach((couple, i) =>
      couple.forEach((player, side) => {
        const expected = numbered(sent[i]![1 - side]!, "m ");
        count += expected.length;
        assert.deepEqual(texts(player), expected, player.name);
        const directly = player.events("message").filter(({ path }) => path === "direct").length;
        assert.ok(
          i % 2 === 0 ? directly === 0 : directly > expected.length / 2,
          `${player.name}: ${directly} directly`,
        );
      })
    );
    console.log(
      `${CLIENTS} clients, ${count} messages, 6 restarts: ${((performance.now() - started) / 1_000).toFixed(1)} s`,
    );
  },
);
