/**
 * Strangers, forgers, observers, peers and servers that mean harm, in the simulated internet: who they are, and the
 * village that they come to. What must not happen is in the tests that are named after them.
 *
 *     stranger     sends anything to anybody
 *     forger       is off the path, knows all addresses, names, public keys and nonces, writes any source address
 *     observer     is on the path: sees every datagram, repeats, delays and redirects them, has no keys
 *     rogue        is logged in, a client that keeps none of the rules
 *     evil server  introduces whom it likes as whom it likes
 *
 * @module
 */
import assert from "node:assert/strict";
import process from "node:process";
import v8 from "node:v8";
import vm from "node:vm";
import { type Control, type ControlBody, decode, type Effect, encode, type Endpoint } from "../protocol.ts";
import { MAGIC, messageTable, type User } from "../protocol.ts";
import { decodeHandshake, encodeClock, encodeHandshake, encodeInner, initiate, type Initiation } from "../protocol.ts";
import { openPeer, type Peer, sealPeer } from "../protocol.ts";
import { controlKeys, diffieHellman, type KeyPair, keysFrom, loginKey, publicNonce } from "../protocol.ts";
import { concat, formatEndpoint, hex, hostOf } from "../protocol.ts";
import { VERSION } from "../protocol.ts";
import { createServer, type Server } from "../server.ts";
import { random, type TraceRecord } from "./network.ts";
import { createWorld, DELAY_MS, join, login, type Player, R, type World } from "./scenario.ts";
import { numbered, texts } from "./testing.ts";

export const SERVER = "192.0.2.1:2280";
/** A third party: nobody may be made to write there. */
export const VICTIM = "198.18.0.1";
export const NO_ID = "0".repeat(16);
export const NO_BYTES = new Uint8Array(0);

// ---------------------------------------------------------------------------------------------------- bytes

export const nameOf = new Map(messageTable().map(({ code, name }) => [code, name]));
export const typeOf = (data: Uint8Array) =>
  data[0] === MAGIC ? nameOf.get(data[1] ?? 0) ?? "no message" : (data[0] ?? 4) < 4 ? "STUN" : "noise";
export const isStun = (data: Uint8Array) => typeOf(data) === "STUN";
/** STUN alone may answer with more than the question: 1.6 times, with IPv6 2.2. */
export const mayAnswer = (question: Uint8Array, answer: Uint8Array) =>
  isStun(question)
    ? isStun(answer) && answer.length <= 2.2 * question.length
    : typeOf(answer) === "COOKIE" && answer.length <= question.length;

/** A stream of random bytes and choices. The bytes are windows into some noise, in which each changes a bit. */
export function dice(seed: string, noiseBytes = 65_536) {
  const next = random(seed), noise = new Uint8Array(noiseBytes);
  for (let i = 0; i < noiseBytes; i++) noise[i] = Math.floor(next() * 256);
  const below = (limit: number) => Math.floor(next() * limit);
  const bytes = (length: number) => {
    const at = below(noise.length - length);
    noise[at]! ^= 1 << below(8);
    return noise.slice(at, at + length);
  };
  return { next, below, bytes, pick: <T>(items: readonly T[]) => items[below(items.length)]! };
}
export type Dice = ReturnType<typeof dice>;

export const MUTATIONS: ((data: Uint8Array, dice: Dice, other: Uint8Array) => Uint8Array)[] = [
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
export function assortment(seen: Seen[], { pick }: Dice): () => Seen {
  const types = [...Map.groupBy(seen, ({ data }) => typeOf(data)).values()];
  return () => pick(pick(types));
}

/** Bytes that are in use after a collection. */
export function memory(): number {
  if ("Bun" in globalThis) (globalThis as unknown as { Bun: { gc(force: boolean): void } }).Bun.gc(true);
  else {
    v8.setFlagsFromString("--expose-gc");
    (vm.runInNewContext("gc") as () => void)();
  }
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}
export const MIB = 2 ** 20;

// ---------------------------------------------------------------------------------------------------- the village

export interface Seen {
  from: Endpoint;
  to: Endpoint;
  data: Uint8Array;
}

export const sends = <T>(effects: Effect<T>[]) => effects.filter((effect) => effect.kind === "send");

/** From now on the server is what `wrap` makes of it, also after a restart. */
export function takeOver(world: World, wrap: (server: Server) => Server): void {
  const { run } = world.serverHost;
  world.serverHost.run = (machine, options) => run(wrap(machine as unknown as Server) as never, options);
  world.restartServer();
}

/** What crosses the core from now on, but for what was injected. */
export function observe(world: World): Seen[] {
  const seen: Seen[] = [];
  world.net.tap(({ host, from, to, data }) => {
    if (host !== "") seen.push({ from, to, data: data.slice() });
  });
  return seen;
}

/** What is sent to the third party from now on. */
export function watchVictim(world: World): TraceRecord[] {
  const hits: TraceRecord[] = [];
  world.net.tap((packet) => {
    if (hostOf(packet.to) === VICTIM) hits.push({ ...packet, data: packet.data.slice() });
  });
  return hits;
}

/** Alice and bob talk directly, carol and dave over the relay; every message of the protocol has crossed the core. */
export function village(seed: number) {
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

export const corpus = village(1).seen;
for (const { name } of messageTable()) {
  if (name !== "P2PPLAN" && !corpus.some(({ data }) => typeOf(data) === name)) throw new Error(`No ${name} was seen`);
}

/** The first message of each type that was seen. */
const firstSeen = new Map<string, Control>();
for (const { data } of corpus) {
  const message = decode(data);
  if (message && !firstSeen.has(message.type)) firstSeen.set(message.type, message);
}

/** A message like those that were seen, with other fields: so that fields that are added later need no change here. */
export function like<T extends ControlBody["type"]>(
  type: T,
  fields: Partial<Extract<ControlBody, { type: T }>>,
): ControlBody {
  return { ...firstSeen.get(type)!, ...fields } as ControlBody;
}

// ---------------------------------------------------------------------------------------------------- by hand

/** What client.ts mixes into a handshake: it must be the same here, or no rogue gets in. */
export interface Party {
  name: string;
  nonce: string;
}
export const prologue = (initiator: Party, responder: Party) =>
  new TextEncoder().encode(`punch ${initiator.name} ${initiator.nonce} ${responder.name} ${responder.nonce}`);

/** A client's end of a login, by hand. */
export interface Hand {
  name: string;
  keys: KeyPair;
  token: string;
  nonce: string;
  hello(): Uint8Array; // the first LOGIN, without a cookie
  answer(data: Uint8Array): Uint8Array | null; // the answer to a COOKIE, or nothing; a WELCOME is taken in
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

export function hand(
  name: string,
  dice: Dice,
  { keys = keysFrom(dice.bytes(32)), clock = 1, keepName = false } = {},
): Hand {
  const loginId = hex(Uint8Array.from({ length: 8 }, () => dice.below(256))); // never the same twice
  let sent = clock, cookie = NO_ID, shared: Uint8Array = NO_BYTES, toServer: Uint8Array = NO_BYTES;
  const loginWith = (cookie: string, key?: Uint8Array) =>
    encode(
      like("LOGIN", {
        cookie,
        key: keys.public,
        proof: NO_ID,
        terms: { version: VERSION, flag: keepName },
        name,
        local: [],
      }),
      {
        id: loginId,
        counter: clock,
        key,
      },
    );
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
      if (message?.type === "COOKIE" && message.id === self.token && self.token !== "" && message.terms.flag) {
        return self.seal(like("KEEPALIVE", { cookie: message.cookie, local: [] })); // shows that we are here
      }
      if (message?.type === "WELCOME" || message?.type === "ALIVE") cookie = message.cookie;
      return null;
    },
    /** A KEEPALIVE without a cookie returns the one that was received last, as an honest one does. */
    seal(message, counter = ++sent) {
      const isHonest = message.type === "KEEPALIVE" && message.cookie === NO_ID;
      return encode(isHonest ? { ...message, cookie } : message, { id: self.token, counter, key: toServer });
    },
  };
  return self;
}

/** Logs in at a machine, without a network; null if that was not granted. */
export function enter(server: Server, self: Hand, { from, now }: { from: Endpoint; now: number }) {
  const say = (data: Uint8Array, at = now, source = from) => server.receive({ socket: 0, from: source, data }, at);
  const [cookie] = sends(say(self.hello()));
  const granted = cookie && sends(say(self.answer(cookie.data)!));
  for (const { data } of granted ?? []) self.answer(data);
  return self.token === "" ? null : { ...self, from, say };
}

/** A logged-in client on the network that keeps none of the rules. */
export interface Rogue extends Hand {
  at: Endpoint;
  heard: Seen[]; // everything that came in
  users: Map<string, User>;
  say(message: ControlBody): void; // to the server
  write(to: Endpoint, data: Uint8Array): void; // to anybody
  open(to: string, frame: Peer): void; // opens a session with a user of that name by a first message that carries this
  isOpen(): boolean; // once that session is there
  sealed(frame: Peer, counter?: number): Uint8Array; // seals a message of that session
  frameOf(data: Uint8Array): Peer | null; // opens what the victim sent in that session
  relay(body: Uint8Array): void; // sends such bytes over the server
  onFrame: (frame: Peer, from: Endpoint) => Uint8Array | null; // called with each message that the victim sent
  stream: string;
}

let rogues = 0;

export function rogue(world: World, name: string, { address, psk = new Uint8Array(32) }: {
  address?: string;
  psk?: Uint8Array;
} = {}): Rogue {
  const dice_ = dice(`rogue ${name}`, 1_024);
  const site = rogues++ % 60_000;
  const host = world.net.host({
    name: `rogue ${name} ${site}`,
    addresses: [address ?? `100.${128 + site % 100}.${Math.floor(site / 100) % 250}.7`],
    delayMs: DELAY_MS,
  });
  const self = hand(name, dice_, { clock: Math.floor(world.net.now()) });
  let target: User | null = null, initiation: Initiation | null = null;
  let session: { theirs: number; send: Uint8Array; receive: Uint8Array; sent: number } | null = null;
  const index = dice_.below(2 ** 32);
  let keepaliveAt = world.net.now() + 20_000;

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
    wake(now) {
      keepaliveAt = now + 20_000;
      const data = self.seal(like("KEEPALIVE", { cookie: NO_ID, local: [] }));
      return [{ kind: "send", socket: 0, to: SERVER, data }];
    },
    wakeAt: () => self.token === "" ? Infinity : keepaliveAt,
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
  let clock = 0; // of first messages
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
      }, concat(Buffer.from(me.stream, "hex"), encodeClock(++clock), encodeInner(frame)));
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
export function rogueCrowd(world: World, names: string[], victim: Player): Rogue[] {
  const crowd = names.map((name) => rogue(world, name));
  world.net.run(3 * R);
  for (const each of crowd) each.say(like("GETALLUSER", { prefix: victim.name, after: "" }));
  world.net.run(2 * R);
  assert.ok(crowd.every((each) => each.token !== "" && each.users.has(victim.name)));
  return crowd;
}

export const part = (seq: number, text: string | Uint8Array, { base = 0, left = 0 } = {}): Peer => ({
  type: "P2PMESSAGE",
  seq,
  base,
  left,
  part: typeof text === "string" ? new TextEncoder().encode(text) : text,
});

// ---------------------------------------------------------------------------------------------------- an office

/** A server at rest, and a way in. Whom it asks whether he is still there says so; that is left out of its effects. */
export function office(options: Partial<Parameters<typeof createServer>[0]> = {}) {
  const tools = dice("office"), keys = keysFrom(tools.bytes(32)), users = new Map<Endpoint, Hand>();
  const asked = createServer({ keys: keysFrom(tools.bytes(32)), random: tools.bytes, ...options });
  const proofOf = (effect: Effect<unknown>) => {
    const user = effect.kind === "send" && users.get(effect.to);
    return (user && decode(effect.data)?.type === "COOKIE" && user.answer(effect.data)) || null;
  };
  const server: Server = {
    ...asked,
    receive(datagram, at) {
      return asked.receive(datagram, at).filter((effect) => {
        const data = proofOf(effect);
        if (effect.kind !== "send" || !data) return true;
        for (const alive of sends(asked.receive({ socket: 0, from: effect.to, data }, at))) {
          users.get(effect.to)!.answer(alive.data);
        }
        return false;
      });
    },
  };
  const now = 1_700_000_000_000;
  /** All have the same keys, unless told otherwise: then the server agrees with them on a secret only once. */
  const come = (name: string, from: Endpoint, at = now, own = keys) => {
    const user = enter(server, hand(name, tools, { keys: own }), { from, now: at });
    if (user) users.set(from, user);
    return user;
  };
  return { server, tools, now, come };
}
export const types = (effects: Effect<unknown>[]) => sends(effects).map(({ data }) => decode(data)!.type);
export const reasonOf = (effects: Effect<unknown>[]) => {
  const message = sends(effects).map(({ data }) => decode(data)!).find(({ type }) => type === "ERROR");
  return message?.type === "ERROR" ? message.reason : undefined;
};
