/**
 * A rogue with everything that a user can have: real keys, real sessions with the server and with several users at a
 * time, an address in each IP version that he may change, and the same name again whenever he likes. What he says is
 * left to the tests; what they must watch is here as well.
 *
 * All that speaks the protocol stands in this file and in `hand` of hostile.ts.
 *
 * @module
 */
import assert from "node:assert/strict";
import type { ClientEvent } from "../client.ts";
import { type Control, type ControlBody, decode, type Effect, type Endpoint } from "../protocol.ts";
import {
  decodeHandshake,
  encodeClock,
  encodeHandshake,
  encodeInner,
  initiate,
  type Initiation,
  respond,
} from "../protocol.ts";
import { concat, hex, hostOf, MAX_DATAGRAM_BYTES, parseEndpoint } from "../protocol.ts";
import { type KeyPair, keysFrom, openPeer, type Peer, peerHeader, sealPeer } from "../protocol.ts";
import type { ServerEvent } from "../server.ts";
import { type Dice, dice, type Hand, hand, like, NO_BYTES, NO_ID, type Party, prologue, SERVER } from "./hostile.ts";
import type { Host, Process } from "./network.ts";
import { DELAY_MS, type Watch, type World } from "./scenario.ts";

export const SERVER6 = "[2001:db8:5::1]:2280";
const NO_SECRET = new Uint8Array(32);

/** What the next KEEPALIVE is to return: the last ALIVE or WELCOME contains it, if the protocol has that. */
const cookieIn = (message: Control) => (message as { cookie?: string }).cookie ?? NO_ID;

// ---------------------------------------------------------------------------------------------------- the rogue

interface Session {
  index: number; // ours, in what we receive
  theirs: number;
  send: Uint8Array;
  receive: Uint8Array;
  sent: number;
}
/** Somebody else, as the server and he himself have shown him. */
export interface Acquaintance extends Party {
  key: Uint8Array;
  candidates: Endpoint[];
  session: Session | null; // the latest one
  probe: number; // of his latest punch
}

export interface Fiend {
  name: string;
  keys: KeyPair;
  dice: Dice;
  host: Host;
  process: Process<never>;
  hand: Hand; // the latest login
  server: Endpoint; // where that was
  known: Map<string, Acquaintance>;
  cookies: Map<Endpoint, string>; // by server: the latest that it has sent here for this session
  /** Logs in (again), with the same keys and a later clock. */
  login(server?: Endpoint, name?: string): void;
  isIn(): boolean;
  write(to: Endpoint, data: Uint8Array): void;
  say(message: ControlBody, server?: Endpoint): void;
  /** A KEEPALIVE that returns what the server has sent here last. */
  keepalive(fields?: object, server?: Endpoint): void;
  /** A first message to that user, with this inside; `as`: as if said by another login, or to another one. */
  first(to: string, frame: Peer, as?: { nonce?: string }): Uint8Array;
  sealed(to: string, frame: Peer, counter?: number): Uint8Array;
  /** Sends bytes over the server. */
  relay(to: string, body: Uint8Array, call?: number): void;
  /** Called with each message that somebody has sealed for us. */
  onFrame(frame: Peer, from: string): void;
  answers: boolean; // first messages with a second one, and cookies with a KEEPALIVE that brings them back
}

export function fiend(
  world: World,
  name: string,
  { seed = name, addresses = ["100.99.7.1", "2001:db8:66::1"] }: { seed?: string; addresses?: string[] } = {},
): Fiend {
  const tools = dice(`fiend ${seed}`, 4_096), keys = keysFrom(tools.bytes(32)), stream = tools.bytes(8);
  const host = world.net.host({ name: `fiend ${name}`, addresses, delayMs: DELAY_MS });
  const openings = new Map<number, { to: string; initiation: Initiation }>(), byIndex = new Map<number, string>();
  const index = () => tools.below(2 ** 32);

  function meet({ name, nonce, key, candidates }: Party & { key: Uint8Array; candidates?: Endpoint[] }): void {
    const { session = null, probe = 0, candidates: before = [] } = me.known.get(name) ?? {};
    me.known.set(name, { name, nonce, key: key.slice(), candidates: candidates ?? before, session, probe });
  }

  function begin(to: string, session: Session): void {
    const them = me.known.get(to)!;
    them.session = session;
    byIndex.set(session.index, to);
  }

  function takePeer(data: Uint8Array, sender?: string): void {
    const handshake = decodeHandshake(data);
    if (handshake?.type === "P2PSECOND") {
      const opening = openings.get(handshake.to), finished = opening?.initiation.finish(handshake.noise);
      if (finished) begin(opening!.to, { index: handshake.to, theirs: handshake.from, ...finished.keys, sent: 0 });
      return takePeer(handshake.sealed);
    }
    if (handshake) {
      const them = sender === undefined ? undefined : me.known.get(sender);
      if (!them || !me.answers) return;
      const options = { own: keys, peer: them.key, psk: NO_SECRET, ephemeral: keysFrom(tools.bytes(32)) };
      const answer = respond({ ...options, prologue: prologue(them, me.hand) }, handshake.noise)?.answer(stream);
      if (!answer) return;
      const from = index();
      begin(them.name, { index: from, theirs: handshake.from, ...answer.keys, sent: 0 });
      const sealed = me.sealed(them.name, { type: "P2PTRASH", probe: tools.below(2 ** 32) });
      const second = { type: "P2PSECOND", to: handshake.from, from, noise: answer.message, sealed } as const;
      return me.relay(them.name, encodeHandshake(second));
    }
    const name = byIndex.get(peerHeader(data)?.index ?? -1), them = name === undefined ? undefined : me.known.get(name);
    const frame = them?.session && openPeer(data, them.session.receive);
    if (!frame) return;
    if (frame.type === "P2PTRASH") them.probe = frame.probe;
    me.onFrame(frame, them.name);
  }

  function takeControl(message: Control, data: Uint8Array, from: Endpoint): void {
    const reply = me.hand.answer(data);
    if (reply) return me.write(from, reply);
    if ("users" in message) message.users.forEach(meet);
    if ("peer" in message && typeof message.peer === "object") meet(message.peer);
    if (message.type === "COOKIE" || message.type === "ALIVE" || message.type === "WELCOME") {
      me.cookies.set(from, cookieIn(message));
    }
    if (message.type === "COOKIE" && message.id === me.hand.token && me.answers) me.keepalive({}, from);
    if (message.type === "RELAYED") takePeer(message.body, message.from);
    if (message.type === "P2PSOMEONEWANTTOCALLYOU") takePeer(message.body, message.peer.name);
  }

  let clock = 0; // of first messages
  const me: Fiend = {
    name,
    keys,
    dice: tools,
    host,
    process: undefined as never,
    hand: undefined as never,
    server: SERVER,
    known: new Map(),
    cookies: new Map(),
    answers: true,
    login(server = SERVER, as = name) {
      me.server = server;
      me.hand = hand(as, tools, { keys, clock: Math.floor(world.net.now()) });
      me.write(server, me.hand.hello());
    },
    isIn: () => me.hand.token !== "",
    write: (to, data) => me.process.perform([{ kind: "send", socket: 0, to, data }]),
    say(message, server = me.server) {
      if (me.isIn()) me.write(server, me.hand.seal(message));
    },
    keepalive(fields = {}, server = me.server) {
      me.say({ ...like("KEEPALIVE", { cookie: me.cookies.get(server) ?? NO_ID, local: [] }), ...fields }, server);
    },
    first(to, frame, { nonce = me.hand.nonce } = {}) {
      const them = me.known.get(to)!, from = index();
      const options = { own: keys, peer: them.key, psk: NO_SECRET, ephemeral: keysFrom(tools.bytes(32)) };
      const payload = concat(stream, encodeClock(++clock), encodeInner(frame));
      const initiation = initiate({ ...options, prologue: prologue({ name: me.hand.name, nonce }, them) }, payload)!;
      openings.set(from, { to, initiation });
      return encodeHandshake({ type: "P2PFIRST", from, probe: 0, noise: initiation.message });
    },
    sealed(to, frame, counter) {
      const session = me.known.get(to)?.session;
      if (!session) return NO_BYTES;
      session.sent = Math.max(session.sent, counter ?? 0);
      return sealPeer(frame, { index: session.theirs, counter: session.sent++, key: session.send });
    },
    relay(to, body, call = 0) {
      me.say(like("P2PTRANS", { to, nonce: me.known.get(to)?.nonce ?? NO_ID, call, body }));
    },
    onFrame: () => {},
  };
  me.process = host.run<never>({
    opened: () => [],
    wake: () => [],
    wakeAt: () => Infinity,
    receive({ from, data }) {
      const message = decode(data);
      if (message) takeControl(message, data, from);
      else takePeer(data);
      return [];
    },
  });
  me.login();
  return me;
}

// ---------------------------------------------------------------------------------------------------- the watch

/** Most sockets at a time: MAX_SOCKETS of client.ts, and the first one. */
const MAX_SOCKETS = 601;

/** What all machines of a world want done, checked; `named`: the hosts that a server has told to anybody. */
export function watchAll() {
  const sockets = new Map<string, Set<number>>(),
    last = new Map<string, number>(),
    named = new Set<string>(),
    most = { sockets: 0 };
  const watch: Watch = (machine, _now, effect: Effect<ClientEvent | ServerEvent>) => {
    const open = sockets.get(machine) ?? new Set([0]);
    sockets.set(machine, open);
    if (effect.kind === "open") {
      open.add(effect.socket);
      last.set(machine, effect.socket);
    } else if (effect.kind === "close") {
      assert.ok(open.delete(effect.socket), `${machine} closes socket ${effect.socket}, which is not open`);
    } else if (effect.kind === "send") {
      const { socket, to, data, ttl } = effect, what = `${machine} sends ${hex(data).slice(0, 8)}.. to "${to}"`;
      assert.ok(parseEndpoint(to), `${what}: that is no endpoint`);
      assert.ok(data.length > 0 && data.length <= MAX_DATAGRAM_BYTES, `${what}: ${data.length} bytes`);
      assert.ok(ttl === undefined || (Number.isInteger(ttl) && ttl > 0 && ttl < 256), `${what}: TTL ${ttl}`);
      if (machine === "server") nameAll(decode(data));
      // A question to a STUN server may be asked again after its socket was closed: `listen` passes over that.
      else assert.ok(socket <= (last.get(machine) ?? 0), `${what}: by socket ${socket}, which was never open`);
    } else {
      const { event } = effect;
      assert.equal(typeof event.event, "string");
      if (event.event === "error") assert.notEqual(event.code, "bug", `${machine}: ${event.message}`);
    }
    most.sockets = Math.max(most.sockets, open.size);
    assert.ok(open.size <= MAX_SOCKETS, `${machine} has ${open.size} sockets`);
  };
  function nameAll(message: Control | null): void {
    if (!message || !("peer" in message) || typeof message.peer !== "object") return;
    for (const candidate of message.peer.candidates) named.add(hostOf(candidate));
  }
  return { watch, named, most, openSockets: (machine: string) => (sockets.get(machine)?.size ?? 1) - 1 };
}
