/**
 * The client: logs in, sends chat messages over the server at once, punches a hole meanwhile, and moves the
 * conversation to the direct path as soon as an echo has come back over it.
 *
 *     alice            NAT          server          NAT            bob
 *       | P2PTRANS "hi" |             |              |              |
 *       |---------------------------->|   P2PSOMEONEWANTTOCALLYOU   |
 *       |        INTRODUCTION         |---------------------------->|  bob has "hi" after one server hop
 *       |<----------------------------|                             |
 *       | punch ------->|~~~~~~~~~~~~~~~~~~~~~~~~~~> X              |  bob's NAT knows no alice yet ...
 *       |               |             |              |<------ punch |
 *       |<--------------|<~~~~~~~~~~~~~~~~~~~~~~~~~~~|              |  ... but alice's NAT has seen alice write to bob:
 *       | echo -------->|~~~~~~~~~~~~~~~~~~~~~~~~~~~>|------------->|  both holes are open
 *
 * The file is made of rooms: small machines that hold their own state and do not know each other. `createConversation`
 * and `createClient` wire them together.
 *
 *     the lesson      link          the session with the server
 *                     calls         how a user is asked for
 *                     conversation  relay first, then the upgrade to a direct path
 *                     paths         punching, the hole while it holds, and what happens when it does not
 *                     discovery     what our NAT is like
 *                     traversal     what to do when plain punching cannot work
 *     the reference   identity      who the peer is
 *                     channel       keys between two clients
 *                     delivery      each message once, whole and in order
 *                     ping, list, sockets, commands, createClient, and the terminal
 *
 * @module
 */
import { randomBytes } from "node:crypto";
import { lookup } from "node:dns/promises";
import { networkInterfaces } from "node:os";
import process from "node:process";
import { createInterface } from "node:readline";
// Machines and messages; endpoints; limits.
import type { Control, ControlBody, Datagram, Effect, Handshake, Introduced, Machine, Peer, User } from "./protocol.ts";
import { controlHeader, decode, decodeHandshake, decodeInner, encode, encodeHandshake } from "./protocol.ts";
import { encodeInner, MAX_CANDIDATES, MAX_NAME_BYTES, MAX_PART_BYTES, MAX_PLANNED_PORTS } from "./protocol.ts";
import {
  type Endpoint,
  formatEndpoint,
  hostOf,
  isIPv6,
  type NatClass,
  parseEndpoint,
  scopeOf,
  VERSION,
} from "./protocol.ts";
import { concat, createLimit, harmless, hex, jsonLine, type Limit, type Rate, userName } from "./protocol.ts";
// STUN; keys and seals.
import { decodeStun, encodeStunRequest, type Stun, STUN_COOKIE } from "./protocol.ts";
import { accept, controlKeys, diffieHellman, generateKeys, type KeyPair, loginKey } from "./protocol.ts";
import { fingerprintOf, initiate, type Initiation, type NoiseKeys, openPeer, passwordProof } from "./protocol.ts";
import { peerHeader, publicNonce, type ReplayWindow, replayWindow, respond, safetyCode } from "./protocol.ts";
import { CLOCK_BYTES, decodeClock, encodeClock, sealPeer, verifies, withPassword } from "./protocol.ts";
// Sockets and the command line.
import { clock, DEFAULT_PORT, environment, exitWith, Failure, identityIn, keyFromWords } from "./protocol.ts";
import { listen, listenOrFail, nameFault, newSecret, openTrace, parseFingerprint } from "./protocol.ts";
import { readArguments, secretWords, tellInvisible, type Trace, UsageError } from "./protocol.ts";

// ---------------------------------------------------------------------------------------------------- in and out

/** Which way a datagram takes: over the server, directly, or directly to a private or loopback address. */
export type PathKind = "relay" | "direct" | "lan";

/** Why a message was not delivered. */
export type Reason = "unknown" | "offline" | "timeout" | "empty" | "too-long" | "untrusted" | "blocked";

/** What the client tells its user. An error with a `notice` is what others did, not what became of a command. */
export type ClientEvent =
  | LoginEvent
  | { event: "users"; users: { name: string; public: Endpoint }[] }
  | MessageEvent
  | { event: "sent"; to: string; id: string; ok: true; ms: number; path: PathKind }
  | { event: "sent"; to: string; id: string; ok: false; ms: number; path: PathKind; reason: Reason }
  | { event: "path"; peer: string; path: PathKind; address: Endpoint; rttMs: number | null; ms: number }
  | { event: "ping"; peer: string; path: PathKind; rttMs: number | null; lost: number }
  | { event: "verify"; peer: string; code: string }
  | { event: "blocked"; peers: string[] }
  | NatEvent
  | { event: "error"; code: string; message: string; fatal?: true; notice?: true }
  | { event: "reconnecting" | "reconnected" | "logout"; name: string; reason: string };

/** The server has let us in. */
export interface LoginEvent {
  /** The name of the event. */ event: "login";
  /** Ours. */ name: string;
  /** Where the server is. */ server: Endpoint;
  /** Where it sees us. */ public: Endpoint;
  /** Our addresses on the LAN. */ local: Endpoint[];
  /** How many users are there. */ users: number;
  /** Of the server's key; see `fingerprintOf`. */ fingerprint: string;
  /** Whether the server has the same key when it is started again. */ kept: boolean;
  /** Whether we have shown each other that we know its password. */ password: boolean;
  /** Whether we talk to those only who know our secret. */ secret: boolean;
}

/** Somebody has written to us. */
export interface MessageEvent {
  /** The name of the event. */ event: "message";
  /** Who. */ from: string;
  /** What, as it was sent: whoever shows it sees to it that nothing in it acts on a terminal. */ text: string;
  /** Which way the first copy came. */ path: PathKind;
  /** The same as the sender's. */ id: string;
}

/** What we know of the NAT that we are behind; null: not known. */
export interface NatEvent extends NatClass {
  /** The name of the event. */ event: "nat";
  /** As the server sees us. */ public: Endpoint;
  /** Whether two clients behind it reach each other by its public address. */ hairpin: boolean | null;
  /** Whether UDP passes at all. */ udp: boolean;
}

/** What the user can ask for. */
export type Command =
  | { command: "send"; to: string; text: string }
  | { command: "getu"; prefix: string }
  | { command: "path"; peer: string | null }
  | { command: "ping"; peer: string; count: number }
  | { command: "verify"; peer: string }
  | { command: "block"; peer: string | null }
  | { command: "unblock"; peer: string }
  | { command: "nat" }
  | { command: "exit" };

/** What a client is made of; everything random comes in here. */
export interface ClientOptions {
  /** User name, as `userName` leaves it. */ name: string;
  /** Our static keys. */ keys: KeyPair;
  /** The server, in one IP version or both. */ servers: Endpoint[];
  /** So many unpredictable bytes. */ random: (length: number) => Uint8Array;
  /** Fresh keys, one pair for each handshake. */ generateKeys: () => KeyPair;
  /** What the two colleagues alone know: 32 bytes. */ psk?: Uint8Array | undefined;
  /** scrypt of the server's password, salted with the server's public key. */
  password?: ((serverKey: Uint8Array) => Uint8Array) | undefined;
  /** Of the key that the server must have; see `fingerprintOf`. */ fingerprint?: string | undefined;
  /** The keys outlive this run: the server is to hold the name for us. */ keepName?: boolean | undefined;
  /** Another STUN server, at another address than ours. */ observer?: Endpoint | undefined;
  /** False: never punch, stay on the relay. */ direct?: boolean | undefined;
  /** Never give up the first login. */ patient?: boolean | undefined;
}

/** A client without sockets. */
export interface Client extends Machine<ClientEvent> {
  /** Carries out a command. */
  command(command: Command, now: number): Effect<ClientEvent>[];
  /** Tells the IP addresses of this host's interfaces, at the start and when they change. */
  interfaces(addresses: string[], now: number): Effect<ClientEvent>[];
}

// ---------------------------------------------------------------------------------------------------- what rooms share

interface Io { // All that a room can see and do of the world outside. Effects leave in the order in which they happen.
  readonly now: number; // when the event that is being handled happened, in ms
  random(length: number): Uint8Array;
  emit(event: ClientEvent): void;
  send(socket: number, to: Endpoint, data: Uint8Array, ttl?: number): void;
  open(then: (socket: number, port: number) => void): void; // one more socket; port 0: that has failed
  close(socket: number): void; // socket 0, the first one, stays open
  /** For what is called later: a bug in it is told, and costs no more than the conversation that it belongs to. */
  guard: Guard;
}

type Guard = <A extends unknown[], R>(act: (...args: A) => R) => (...args: A) => R | undefined;

const guardWith = (broken: (error: unknown) => void): Guard => (act) => (...args) => {
  try {
    return act(...args);
  } catch (error) {
    broken(error);
  }
};

/** A way to the peer: over the server, or a path from one of our sockets to one of the peer's endpoints. */
type Way = { kind: "relay"; rtt: Estimator } | Path;

type Origin = { socket: number; from: Endpoint } | null; // where a peer's datagram came from; null: over the relay

interface Estimator { // smoothed round-trip time and its variation, in ms (RFC 6298)
  srtt: number | null; // null: nothing measured yet
  rttvar: number;
}

/** A time-out while nothing has been measured; then not under, and never over; and how much longer each next one is. */
const RTO_FIRST_MS = 400, RTO_MIN_MS = 200, RTO_MAX_MS = 2_000, RTO_GROWTH = 1.5;
/** The clock has jumped, as on a laptop that slept: nothing that fell due meanwhile has failed for that reason. */
const JUMP_MS = 5_000;

const newEstimator = (): Estimator => ({ srtt: null, rttvar: 0 });

function sample(estimator: Estimator, rttMs: number): void {
  if (rttMs > JUMP_MS) return;
  const { srtt, rttvar } = estimator;
  estimator.rttvar = srtt === null ? rttMs / 2 : 0.75 * rttvar + 0.25 * Math.abs(srtt - rttMs);
  estimator.srtt = srtt === null ? rttMs : 0.875 * srtt + 0.125 * rttMs;
}

/** How long to wait for an answer after so many tries. */
function timeout({ srtt, rttvar }: Estimator, tries: number): number {
  const first = srtt === null ? RTO_FIRST_MS : Math.max(RTO_MIN_MS, srtt + 4 * rttvar);
  return Math.min(RTO_MAX_MS, first * RTO_GROWTH ** (tries - 1));
}

/** Keepalives of several clients, or on several paths, must not fall into step: 20 % more or less at random. */
const SPREAD = 0.2;
const spread = (io: Io, ms: number) => ms * (1 - SPREAD + 2 * SPREAD * randomNumber(io, 16) / 2 ** 16);

const randomNumber = (io: Io, bits: number) => io.random(4).reduce((sum, byte) => sum * 256 + byte, 0) % 2 ** bits;

/**
 * Work in steps with pauses: what the generator yields is when (ms) it goes on. The steps that are due are done at
 * once. What is begun replaces what was under way.
 */
function createScript(io: Io) {
  let steps: Iterator<number, void> | null = null, at = Infinity;
  const wake = () => {
    for (const current = steps; current && current === steps && io.now >= at;) {
      const { done, value } = current.next();
      if (current !== steps) return; // it has begun another one, or stopped itself
      at = done ? Infinity : value!;
      if (done) steps = null;
    }
  };
  const begin = (next: Iterator<number, void> | null) => {
    steps = next;
    at = next ? io.now : Infinity;
    wake();
  };
  return { begin, stop: () => begin(null), wake, wakeAt: () => at, isOn: () => steps !== null };
}

const UNKNOWN_NAT: NatClass = { mapping: "unknown", filtering: "unknown", allocation: "unknown" };
/** Symmetric: a new destination gets a new port outside. */
const isSymmetric = ({ mapping }: NatClass) => mapping === "APDM" || mapping === "ADM";
const isPredictable = ({ allocation }: NatClass) => allocation === "preserving" || allocation === "sequential";
/** Symmetric, and nobody can tell the next port. */
const isRandom = (nat: NatClass) => isSymmetric(nat) && !isPredictable(nat);

const NO_ID = "0".repeat(16);
const NO_BYTES = new Uint8Array(0);
const utf8 = new TextEncoder(), fromUtf8 = new TextDecoder("utf-8", { ignoreBOM: true });
const sameKey = (one: Uint8Array, other: Uint8Array) => one === other || one.every((byte, i) => byte === other[i]);
const tenths = (ms: number) => Math.round(ms * 10) / 10;
/** Of two keys, whose owner goes first where both would do the same. */
const isLower = (one: Uint8Array, other: Uint8Array) => hex(one) < hex(other);

// ---------------------------------------------------------------------------------------------------- link
//
//     LOGIN, padded ------------>    the server keeps nothing of it, and answers with no more bytes
//     <------------------- COOKIE    "show that you receive there"
//     LOGIN with cookie, MAC --->
//     <------------------ WELCOME    the token: from here on everything has a counter and a MAC
//     KEEPALIVE ---------------->    holds our NAT's mapping open, without which no call would reach us ...
//     <-------------------- ALIVE    ... and tells where the server sees us now: if that has changed, so has our NAT
//     KEEPALIVE ---------------->    returns the cookie of the last ALIVE: we still receive where we say we are
//
// The session with the server. Knows nothing of peers, of their keys and of paths to them.
//
// Anybody on the way can answer in the server's place, and read and forge what the server could. So its key counts:
//
//     the user knows its fingerprint          no other key will do
//     the server has said that it keeps it    no other key will do from then on, while this program runs
//     it has said that it does not            another one will, if the server itself stays silent, and the user is told

const FIRST_LOGIN_MS = 10_000; // the first login ends in an error after so long, unless the user is patient
/** Between two attempts to log in: grows by half each time, up to the second number. */
const LOGIN_RETRY_MS = 400, LOGIN_RETRY_MAX_MS = 3_000;
/** After so many attempts without a word from the server we forget what it has said: it may be another one by now. */
const TRIES_BEFORE_RESTART = 4;
/**
 * Idle: under the 30 s after which the strictest NATs forget (RFC 4787 REQ-5 asks for 2 minutes; few heed it). Warm,
 * with a direct path: a carrier may end all our mappings at once, and no message may wait 15 s for the next keepalive.
 * With a conversation on the relay: a server that was restarted must be noticed before a message fails.
 */
const KEEPALIVE_MS = { idle: 20_000, warm: 10_000, relay: 2_000 };
/** So many keepalives in a row unanswered, and nothing else heard from it: the server is gone. */
const KEEPALIVE_TRIES = 8;
/** Somebody answers in the place of the server: for so long it has time to answer itself. */
const IMPOSTOR_MS = 3_000;
/** A password's key costs a tenth of a second for each key of a server. */
const PASSWORD_KEYS: Rate = { perSecond: 0.5, burst: 3 };
/** Cookies that we bring back without anything between that shows progress; more would be a loop. */
const MAX_CHALLENGES = 5;

const newLogin = (id: string, now: number, delayMs: number) => ({ // A login under way, the first one or another.
  id, // known to us and the server alone
  clock: Math.floor(now), // its counter: of two logins with one key the greater is the later
  since: now,
  tries: 0,
  nextAt: now + delayMs,
  askedAt: now,
  challenges: 0,
  challenge: null as Challenge | null, // of the server, once we have one
});

/** A COOKIE, what we agree on with whoever has sent it, and that with the password: the session's keys come of it. */
type Challenge = { cookie: string; server: Endpoint; key: Uint8Array; shared: Uint8Array; agreed: Uint8Array };

/** A session, from the login that it comes of and the message that welcomes us. */
const newServerSession = ({ clock, challenge }: Login, { id, token, public: endpoint, secondPort }: Welcome) => ({
  server: challenge!.server,
  token,
  nonce: publicNonce(id), // of this login, as other users know it
  keys: controlKeys(challenge!.agreed, token),
  window: replayWindow(),
  sent: clock, // the counter that we used last
  public: endpoint, // as the server sees us
  secondPort,
  cookies: new Map<Endpoint, string>(), // by endpoint of the server: what the next KEEPALIVE there must return
  keepaliveAt: Infinity,
  /** Keepalives without an answer: counter and time of the first one and of the latest. */
  asked: null as { first: number; since: number; counter: number; at: number; tries: number } | null,
  challenges: 0, // cookies that we have brought back since the last ALIVE
});

type Login = ReturnType<typeof newLogin>;
type Welcome = Control & { type: "WELCOME" };
type ServerSession = ReturnType<typeof newServerSession>;
type Link = ReturnType<typeof createLink>;

function createLink(
  io: Io,
  options: ClientOptions,
  self: { local(): Endpoint[]; nat(): NatClass; pace(): keyof typeof KEEPALIVE_MS }, // what the server is to know of us
  on: { users(users: User[]): void; message(message: Control): void; session(isAgain: boolean): void } & {
    endpoint(): void; // where the server sees us is known, or has changed:
    moved(): void; // it has changed
    confirmed(): void; // the server has heard our latest keepalive
    refused(): void; // nothing can happen any more
  },
) {
  const { name, keys, servers, fingerprint, patient = false } = options;
  const rtt = newEstimator(), mayMakeKey = createLimit(PASSWORD_KEYS);
  let session: ServerSession | null = null, login: Login | null = null, forgottenAt = -Infinity;
  let toldVersion = -1; // of the server, as the user has heard it
  let trusted: { key: Uint8Array; isKept: boolean } | null = null; // the server's key, since it has let us in
  let passwordKey: { serverKey: Uint8Array; key: Uint8Array } | null = null;
  /** Somebody has answered in the server's place, since when, and how it shows; nothing sealed has come since. */
  let impostor: { since: number; code: string; message: string } | null = null;

  const rttMs = () => Math.min(65_535, Math.round(rtt.srtt ?? 0));
  const otherVersion = () => servers.find((endpoint) => isIPv6(endpoint) !== isIPv6(session!.server));

  /** Says something under the seal of the session; returns its counter. */
  function toServer(message: ControlBody, to = session!.server): number {
    const counter = ++session!.sent;
    io.send(0, to, encode(message, { id: session!.token, counter, key: session!.keys.toServer }));
    return counter;
  }

  // -- getting in

  const beginLogin = (delayMs = 0) => void (login = newLogin(hex(io.random(8)), io.now, delayMs));

  function sendLogin({ id, clock, challenge, tries } = login!): void {
    // The IP versions take turns until one of them has answered.
    const to = challenge?.server ?? servers[tries % servers.length]!;
    login!.nextAt = io.now + Math.min(LOGIN_RETRY_MAX_MS, LOGIN_RETRY_MS * RTO_GROWTH ** tries);
    login!.tries++;
    login!.askedAt = io.now;
    const message = {
      type: "LOGIN",
      cookie: challenge?.cookie ?? NO_ID,
      key: keys.public,
      proof: challenge && options.password ? passwordProof(challenge.agreed, id) : NO_ID,
      terms: { version: VERSION, flag: options.keepName ?? false },
      direct: Number(options.direct !== false),
      rttMs: rttMs(),
      name,
      local: challenge ? self.local() : [], // nobody's business before we know whose key that is
    } as const;
    const key = challenge ? loginKey(challenge.shared, id) : undefined;
    io.send(0, to, encode(message, { id, counter: clock, key }));
  }

  function onCookie(message: Control & { type: "COOKIE" }, from: Endpoint): void {
    if (login && message.id === login.id && message.counter === login.clock) {
      const isSilent = !login.challenge && login.tries > 1 && hadTime(login.since);
      if (!mayBeServer(message.key, isSilent)) return;
      if (message.terms.version !== VERSION) return onOtherVersion(message.terms.version);
      if (login.challenges++ >= MAX_CHALLENGES) return;
      if (login.tries === 1) sample(rtt, io.now - login.askedAt); // sent once: so we know which one is answered
      answerChallenge(message, from);
    } else if (session && message.id === session.token) {
      if (message.terms.flag) { // it knows us, and wants to know that we are here
        if (session.challenges++ < MAX_CHALLENGES) keepalive(from, message.cookie);
      } else if (!session.asked) keepalive(); // a hint, but anybody on the way could have replayed it
      else if (message.counter >= session.asked.first && !login) { // that answers our question: it does not know us
        if (!mayBeServer(message.key, hadTime(session.asked.since))) return;
        reconnect("the server has forgotten us");
        forgottenAt = io.now;
        if (message.terms.version === VERSION) answerChallenge(message, from); // else the answer to our LOGIN will say so again
      }
    }
  }

  /** Logs in with that cookie. */
  function answerChallenge({ cookie, key }: Control & { type: "COOKIE" }, server: Endpoint): void {
    const shared = diffieHellman(keys.secret, key), agreed = shared && mixInPassword(shared, key);
    if (!shared || !agreed) return;
    login!.challenge = { cookie, server, key: key.slice(), shared, agreed };
    sendLogin();
  }

  /** Null: somebody makes us compute the password's key again and again. */
  function mixInPassword(shared: Uint8Array, serverKey: Uint8Array): Uint8Array | null {
    if (!options.password) return shared;
    if (!passwordKey || !sameKey(passwordKey.serverKey, serverKey)) {
      if (!mayMakeKey(io.now)) return null;
      passwordKey = { serverKey: serverKey.slice(), key: options.password(serverKey) };
    }
    return withPassword(shared, passwordKey.key);
  }

  /** Whether the server has had time to answer what we said then. */
  const hadTime = (since: number) => io.now - since >= timeout(rtt, 1);

  /** Whether whoever has that key may be the server; `isSilent`: the one whom we know has not answered in time. */
  function mayBeServer(key: Uint8Array, isSilent: boolean): boolean {
    const expected = fingerprint ?? (trusted && fingerprintOf(trusted.key)), found = fingerprintOf(key);
    if (expected === null || found === expected) return true;
    if (fingerprint === undefined && !trusted!.isKept) return isSilent;
    const where = servers.join(" or ");
    const message =
      `The server at ${where} has another key, ${found}, than it must have, ${expected}: somebody may be in ` +
      "its place. Ask whoever runs it for its fingerprint";
    impostor ??= { since: io.now, code: "server-key", message };
    return false;
  }

  /** Nobody has sealed that, so it only ends what has not begun. */
  function onOtherVersion(theirs: number): void {
    const [what, who] = theirs < VERSION ? ["an older", "the server"] : ["a newer", "this program"];
    const text = `The server speaks ${what} version of the protocol (${theirs}, we ${VERSION}): update ${who}`;
    if (!session) on.refused();
    else if (toldVersion === theirs) return; // that has been said
    toldVersion = theirs;
    io.emit({ event: "error", code: "version", message: text, ...session ? { notice: true } : { fatal: true } });
  }

  function onWelcome(message: Welcome, data: Uint8Array): void {
    if (!login?.challenge || message.id !== login.id) return;
    const { key } = login.challenge, next = newServerSession(login, message), { server, public: endpoint } = next;
    if (!verifies(data, next.keys.toClient)) {
      const text =
        `What answers at ${server} does not know the password: it is another server, or somebody in its place`;
      if (options.password) impostor ??= { since: io.now, code: "bad-password", message: text };
      return;
    }
    if (login.tries === 2) sample(rtt, io.now - login.askedAt); // once without the cookie, once with it
    const isAgain = session !== null, isKept = message.kept === 1;
    const hasOtherKey = trusted !== null && !sameKey(trusted.key, key);
    session = next;
    trusted = { key, isKept };
    impostor = null;
    session.keepaliveAt = io.now + spread(io, KEEPALIVE_MS.idle);
    session.cookies.set(server, message.cookie);
    toldVersion = -1;
    login = null;
    on.users(message.users);
    if (hasOtherKey) {
      const text =
        `The server has another key now, ${fingerprintOf(key)}: it was started again without --identity, or ` +
        "somebody is in its place. Compare with your colleagues: verify NAME";
      io.emit({ event: "error", code: "server-key-changed", message: text, notice: true });
    }
    if (isAgain) io.emit({ event: "reconnected", name, reason: "" });
    else {
      const known = { fingerprint: fingerprintOf(key), kept: isKept };
      const given = { password: options.password !== undefined, secret: options.psk !== undefined };
      const { total: users } = message, local = self.local();
      io.emit({ event: "login", name, server, public: endpoint, local, users, ...known, ...given });
    }
    on.endpoint();
    const other = otherVersion();
    if (other) keepalive(other);
    on.session(isAgain);
  }

  function onRefusal(message: Control & { type: "ERROR" }, data: Uint8Array): void {
    if (!login?.challenge || !verifies(data, loginKey(login.challenge.shared, login.id))) return;
    const texts: Record<string, string> = {
      "name-taken": `Somebody else is "${name}": choose another name` +
        (message.seconds > 0 ? `, or try again in ${message.seconds} s` : ""),
      "bad-name": `The server does not accept the name "${name}"`,
      "bad-password": options.password
        ? "The server has another password"
        : "The server asks for its password: give it with --password-file",
      "no-password": "The server has no password: leave yours out, if it is the server that you mean",
      "full": "The server is full: try again later",
    };
    const { reason: code } = message, text = texts[code] ?? "The server refuses us";
    if (!session) on.refused();
    io.emit({ event: "error", code, message: text, ...session ? {} : { fatal: true } });
  }

  /** The session goes on, and direct conversations with it, until the server says that we are in again. */
  function reconnect(reason: string, delay = 0): void {
    if (!login) io.emit({ event: "reconnecting", name, reason });
    beginLogin(delay);
  }

  // -- staying in

  function keepalive(to = session!.server, cookie = session!.cookies.get(to) ?? NO_ID): void {
    const message = { type: "KEEPALIVE", cookie, rttMs: rttMs(), nat: self.nat(), local: self.local() } as const;
    const counter = toServer(message, to);
    if (to !== session!.server) return;
    const { first, since, tries } = session!.asked ?? { first: counter, since: io.now, tries: 0 };
    session!.asked = { first, since, counter, at: io.now, tries: tries + 1 };
    session!.keepaliveAt = io.now + timeout(rtt, session!.asked.tries);
  }

  function onAlive(message: Control & { type: "ALIVE" }, from: Endpoint): void {
    session!.challenges = 0;
    session!.cookies.set(from, message.cookie);
    if (from !== session!.server) return;
    const isLatest = session!.asked?.counter === message.asked;
    if (isLatest) sample(rtt, io.now - session!.asked!.at);
    session!.asked = null;
    session!.keepaliveAt = io.now + spread(io, KEEPALIVE_MS[self.pace()]);
    if (login) { // the server knew us all the time
      login = null;
      io.emit({ event: "reconnected", name, reason: "" });
    }
    if (isLatest) on.confirmed();
    if (message.public === session!.public) return;
    session!.public = message.public;
    on.endpoint();
    on.moved();
  }

  function receive(message: Control, { from, data }: Datagram): void {
    if (message.type === "COOKIE") return onCookie(message, from);
    if (message.type === "WELCOME") return onWelcome(message, data);
    if (message.type === "ERROR" && message.id === login?.id) return onRefusal(message, data);
    if (message.id !== session?.token || !verifies(data, session.keys.toClient)) return;
    if (!accept(session.window, message.counter)) return;
    impostor = null;
    if (session.asked) session.asked.tries = 1; // the server lives, whatever became of our keepalives
    if (message.type === "ALIVE") onAlive(message, from);
    else if (message.type === "LOGOUT") reconnect("the server is going down", LOGIN_RETRY_MS);
    else on.message(message);
  }

  function wake(): void {
    if (impostor && io.now >= impostor.since + IMPOSTOR_MS) {
      const { code, message } = impostor;
      impostor = null;
      io.emit({ event: "error", code, message, fatal: true });
      return on.refused();
    }
    if (session && !login && io.now >= session.keepaliveAt) {
      const other = otherVersion();
      if ((session.asked?.tries ?? 0) >= KEEPALIVE_TRIES) reconnect("the server does not answer");
      else keepalive();
      if (other && !login && session.asked!.tries === 1 && self.pace() !== "relay") keepalive(other);
    }
    if (!login || io.now < loginAt(login)) return;
    const isFirst = !session, where = servers.join(" or ");
    if (isFirst && !patient && io.now - login.since >= FIRST_LOGIN_MS) {
      const message = `No answer from the server at ${where}: is it running, and is UDP let through?`;
      io.emit({ event: "error", code: "unreachable", message, fatal: true });
      return on.refused();
    }
    if (isFirst && patient && login.tries === 5) {
      io.emit({ event: "error", code: "unreachable", message: `No answer yet from ${where}, trying on` });
    }
    login.challenges = 0;
    if (login.tries > 0 && login.tries % TRIES_BEFORE_RESTART === 0) { // perhaps another address or IP version by now
      login.challenge = null;
      login.id = hex(io.random(8));
      login.clock = Math.max(login.clock + 1, Math.floor(io.now));
    }
    sendLogin();
  }

  const loginAt = ({ nextAt, since }: Login) => session || patient ? nextAt : Math.min(nextAt, since + FIRST_LOGIN_MS);

  return {
    ...{ rtt, toServer, receive, wake },
    wakeAt: () =>
      Math.min(
        impostor ? impostor.since + IMPOSTOR_MS : Infinity,
        login ? loginAt(login) : session?.keepaliveAt ?? Infinity,
      ),
    session: () => session,
    forgottenAt: () => forgottenAt, // when the server has last been restarted, as far as we can tell
    begin() {
      beginLogin();
      wake();
    },
    report: () => session && !login && keepalive(), // tells the server what has changed here
    /** Speaks to the server, which opens the way from it again, should the NAT have forgotten. */
    check: () => session && !login && !session.asked && keepalive(),
    checkSoon() { // A message is on the relay: soon we want to know whether the server still lives.
      if (session) session.keepaliveAt = Math.min(session.keepaliveAt, io.now + KEEPALIVE_MS.relay);
    },
  };
}

// ---------------------------------------------------------------------------------------------------- calls
//
// To call somebody is to ask the server for an introduction. It tells both sides, in the same tick, where the server
// has seen the other one, because both must punch at once (why: see "paths"). The first message travels with the first
// call. This room knows how often we have asked and when we ask again, but not what becomes of it. The Context `c`,
// what it may ask of its conversation, is declared there.

const MAX_ROUNDS = 5; // rounds of "ask the server to have the other side punch, then send again"
/** After so many seconds on the relay a direct path is tried again. */
const RETRY_DIRECT_MS = [2_000, 5_000, 15_000, 60_000, 300_000];
/** So many tries of the part that all others wait for, over the relay: the peer may have forgotten the session. */
const FORGOTTEN_AFTER = 4;

function createCalls(
  io: Io,
  c: Context,
  link: Link,
  has: { triesOfOldest(): number; firstHandshake(): Uint8Array | null; isPunching(): boolean },
) {
  /** The search for a path: since when, how often we have asked, and when we ask again for a missing answer. */
  let since = io.now, rounds = 0, askAt = Infinity;
  /** While there is only the relay: how often the search has begun again, and when it does so next. */
  let retries = 0, retryAt = Infinity;

  /**
   * Passes bytes on over the server; `mayCall`: and asks for an introduction, up to five times, or as long as nothing
   * comes back: the peer may not know any more who we are.
   */
  function viaServer(body: Uint8Array, mayCall: boolean): void {
    if (!link.session()) return;
    const isUseful = has.triesOfOldest() > FORGOTTEN_AFTER ||
      (rounds < MAX_ROUNDS && (c.canBeDirect() || !c.hasSession()));
    passOn(body, mayCall && !c.best() && isUseful);
  }

  function passOn(body: Uint8Array, call: boolean): void {
    const nonce = c.peer()?.nonce ?? NO_ID, says = Number(call) + 2 * Number(c.isFriend());
    link.toServer({ type: "P2PTRANS", to: c.name, nonce, call: says, body });
    if (!call) return;
    rounds++;
    askAt = Infinity;
    if (!c.canBeDirect()) return;
    if (rounds < MAX_ROUNDS) askAt = io.now + timeout(link.rtt, rounds); // should the introduction be lost
    else if (!c.best() && !has.isPunching() && retryAt === Infinity) retryLater();
  }

  function ask(): void {
    if (!c.canBeDirect()) askAt = Infinity; // perhaps not any more
    else if (link.session()) passOn((!c.hasSession() && has.firstHandshake()) || NO_BYTES, true);
  }

  function retryLater(): void {
    retryAt = io.now + RETRY_DIRECT_MS[Math.min(retries++, RETRY_DIRECT_MS.length - 1)]!;
  }

  function begin(): void {
    since = io.now;
    rounds = retries = 0;
  }

  function again(): void { // something has changed: we ask as if for the first time
    begin();
    ask();
  }

  function onPath(): void {
    retryAt = askAt = Infinity;
    rounds = retries = 0;
  }

  function wake(): void {
    if (link.session() && io.now >= askAt) ask();
    if (io.now < retryAt) return;
    retryAt = Infinity;
    rounds = 0;
    if (!c.isWarm()) return;
    retryLater();
    ask();
  }

  return {
    ...{ viaServer, ask, again, begin, retryLater, onPath, wake },
    wakeAt: () => Math.min(link.session() ? askAt : Infinity, retryAt),
    since: () => since,
    isRetry: () => retries > 0,
    isWaiting: () => retryAt !== Infinity,
    onCalled: () => void (since = io.now), // the other side's search is ours
    onAnswer: () => void (askAt = Infinity),
    onOtherLogin: () => void (rounds = 0),
    onPunching: () => void (retryAt = Infinity),
  };
}

// ---------------------------------------------------------------------------------------------------- conversation
//
//                    introduced               echo: best                no answer: suspect
//     over the relay ----------> ... and punch ----------> over the path -----------------> over both
//          ^                                                     ^                            |  |
//          |                                                     '---- echo: good again ------'  |
//          '------------------------------------------------- no echo of six probes: lost -------'
//
// All that goes on with one other user. The first message goes over the relay at once, because nobody should wait for a
// hole; the path takes over when it has proved itself. No move loses a message: delivery numbers the parts, keeps what
// has not been acknowledged, and sends it again when the way changes; the peer takes the first copy of each. Knows whom
// we talk to and by which way, and wires the rooms together; it looks into no datagram.
//
// A punch is a sealed P2PTRASH, which asks for an echo. Before there is a session to seal it with, a copy of
// P2PFIRST takes its place, the handshake with the first message in it, which the peer has had over the relay. A punch
// on a path in use is called a probe; one that the user asks for, a ping. Three rooms of the reference take part:
//
//     identity   whom the server takes the peer for (`peer`, `renew`), and whether the user trusts that key
//     channel    opens a session with it (`open`), seals for it (`seal`, `punch`), and hands over what it has opened
//     delivery   takes messages (`push`), has their parts carried, again and again (`resend`), until they have arrived

const WARM_MS = 300_000; // A message went either way so recently: the conversation is warm, its path is kept open.
/** So long after its restart the last client may come back to the server: one whose keepalive was due only then. */
const ALL_BACK_MS = 30_000;
const INTRODUCTIONS_PER_PEER: Rate = { perSecond: 5, burst: 20 };

interface Context { // what the rooms of a conversation may ask
  name: string; // of the peer
  relay: Way;
  canBeDirect(): boolean; // not with ourselves, and not if one of the two does not want it
  server(): ServerSession | null;
  peer(): Introduced | null; // the server's latest word on who that is
  isTrusted(key: Uint8Array): boolean; // no other key than the one that the user has verified, if he has
  /** When a message went either way; when the peer spoke under a session's seal; when the server said where it is. */
  last: { readonly talk: number; readonly heard: number; readonly attested: number };
  isWarm(): boolean;
  best(): Path | null; // the path in use
  way(): Way; // the way in use
  hasSession(): boolean; // with the peer
  punch(probe: number): Uint8Array | null; // the bytes of a punch
  may: Shared["may"];
  isFriend(): boolean; // the user has written to the peer, or has verified its key
}

interface Shared { // what all conversations of a client have in common
  options: ClientOptions;
  link: Link;
  discovery: Discovery;
  switchboard: Switchboard;
  sprayTurn: SprayTurn;
  user(name: string): User | undefined; // in the list of users
  isVerified(name: string): boolean; // the user has seen its key
  isTrusted(name: string, key: Uint8Array): boolean;
  may(what: keyof typeof HOST_LIMITS): boolean; // of all of this host's conversations together
  hasSockets(count: number): boolean;
  broken(c: Conversation, error: unknown): void; // a bug has shown in it: it is over
}

/** The client's, in which a bug ends the conversation; `stale`: somebody has looked at the clock. */
function conversationIo(io: Io, on: { stale(): void; isOver(): boolean; broken(error: unknown): void }): Io {
  const guard: Guard = (act) => {
    const guarded = guardWith(on.broken)(act);
    return (...args) => on.isOver() ? undefined : guarded(...args);
  };
  return {
    ...io,
    guard,
    send: (...datagram) => on.isOver() || io.send(...datagram),
    open: (then) =>
      on.isOver() || io.open((socket, port) => on.isOver() ? io.close(socket) : guard(then)(socket, port)),
    get now() {
      on.stale();
      return io.now;
    },
  };
}

/** All these functions, guarded. */
const guardAll = <T extends object>({ guard }: Io, acts: T): T =>
  Object.fromEntries(Object.entries(acts).map(([name, act]) => [name, guard(act)])) as T;

type Conversation = ReturnType<typeof createConversation>;
function createConversation(clientIo: Io, name: string, shared: Shared) {
  const { options, link } = shared, isSelf = name === options.name;
  const mayBeIntroduced = createLimit(INTRODUCTIONS_PER_PEER);
  const last = { talk: -Infinity, heard: -Infinity, attested: -Infinity };
  let lastError: Reason | null = null, mayAnswer = true;
  /** When this conversation is due; null: stale, since every room that reads the time may set a deadline. */
  let dueAt: number | null = null;
  let isOver = false; // it has been ended: what is called back now does nothing
  const io = conversationIo(clientIo, {
    stale: () => void (dueAt = null),
    isOver: () => isOver,
    broken: (error) => shared.broken(conversation, error),
  });
  const c: Context = {
    ...{ name, last, server: link.session, may: shared.may },
    relay: { kind: "relay", rtt: newEstimator() },
    canBeDirect: () => options.direct !== false && !isSelf && !identity.isHidden(),
    peer: () => identity.peer(),
    isTrusted: (key) => shared.isTrusted(name, key),
    isWarm: () => clientIo.now - last.talk < WARM_MS, // a question, which sets no deadline
    best: () => paths.best(),
    way: () => paths.best() ?? c.relay,
    hasSession: () => channel.current() !== null,
    punch: (probe) => channel.punch(probe),
    isFriend: () => delivery.hasSent() || shared.isVerified(name),
  };

  // -- the heart: send by the way in use, by both while that is suspect

  function waysInUse(): Way[] {
    const path = c.best();
    return !path ? [c.relay] : path.state === "suspect" ? [path, c.relay] : [path];
  }

  /** Sends the same sealed bytes every way given. False: there is no session yet to seal them with. */
  function carry(frame: Peer, ways = waysInUse(), { mayCall = false, session = channel.current() } = {}): boolean {
    if (!session) return false;
    const data = channel.seal(frame, session);
    for (const way of ways) {
      if (way.kind === "relay") calls.viaServer(data, mayCall);
      else io.send(way.socket, way.endpoint, data);
    }
    return true;
  }

  function onFrame(frame: Peer, origin: Origin, stream: string): void {
    const path = paths.over(origin), kind = origin ? kindOf(origin.from) : "relay";
    if (frame.type === "P2PMESSAGE") {
      const back = (ack: Peer) => carry(ack, path?.state === "good" ? [path] : waysInUse());
      delivery.onPart(frame, { kind, stream, back });
    } else if (frame.type === "P2PMESSAGEACK") {
      if (path && path.state !== "trying") paths.onAnswer(path);
      delivery.onAck(frame, path ?? c.relay);
    } else if (frame.type === "P2PTRASH") paths.onPunch(frame.probe, origin);
    else if (frame.type === "P2PPLAN") traversal.onPlan(frame);
    else paths.onEcho(frame.probe, origin);
  }

  // -- what happens

  function startPunching(): void { // both sides have been introduced in the same tick, so both punch now
    if (!c.canBeDirect() || !channel.canPunch()) return;
    calls.onPunching();
    paths.startPunching(c.peer()!.punchAfterMs);
    traversal.onIntroduction();
  }

  /** The peer can be reached again: no need to wait out a time-out that has grown meanwhile. */
  const resendOverdue = () => delivery.resend(io.now - (c.relay.rtt.srtt ?? RTO_FIRST_MS));

  function resendAll(): void {
    channel.hurry();
    delivery.resend(Infinity);
  }

  function onTalk(): void { // A message goes either way.
    last.talk = io.now;
    if (!c.best()) link.checkSoon();
    paths.onTalk();
  }

  function onSessionReady(): void { // what has waited for a session can go
    if (delivery.isAckDue() && c.hasSession()) delivery.acknowledge(carry);
    traversal.onSessionReady();
    delivery.wake();
  }

  function failAll(reason: Reason): void {
    delivery.failAll(reason);
    ping.fail(reason);
  }

  function tellPath(): void {
    const way = c.way(), { srtt } = way.rtt, rttMs = srtt === null ? null : tenths(srtt);
    const address = way.kind === "relay" ? link.session()?.server ?? options.servers[0]! : way.endpoint;
    io.emit({ event: "path", peer: name, path: way.kind, address, rttMs, ms: tenths(io.now - calls.since()) });
  }

  // -- the rooms of this conversation: what one of them finds out, and what others do about it

  const identity = createIdentity(io, c, { known: shared.user(name), isSelf, ownKey: options.keys.public }, {
    otherLogin() {
      last.heard = -Infinity;
      channel.dropHandshake();
      calls.onOtherLogin();
    },
    untrusted: () => failAll("untrusted"),
    mayWarn: () => shared.may("warn"),
  });
  const calls = createCalls(io, c, link, {
    triesOfOldest: () => delivery.triesOfOldest(),
    firstHandshake: () => channel.firstHandshake(),
    isPunching: () => paths.isPunching(),
  });
  const attempt = { holds: (socket: number) => traversal.holds(socket), made: (path: Path) => traversal.made(path) };
  const paths = createPaths(io, c, attempt, {
    // This is the whole upgrade from relay to path, and the way back. An echo over a path proves that it works in both
    // directions, and only then does it carry messages alone. Until then the relay does; it helps while the path is
    // suspect. What may have been lost on the old way goes at once by the new one.
    best() {
      traversal.onBest();
      calls.onPath();
      resendOverdue();
      tellPath();
    },
    suspect() {
      link.check();
      delivery.resendInFlight(); // by both ways, see `waysInUse`
    },
    doubt: () => calls.ask(), // two probes without an echo: perhaps the peer is at another endpoint by now
    lost() {
      tellPath();
      calls.again();
      resendAll();
    },
    ageing: () => traversal.begin(RENEWAL),
    punched: () => void (link.session() && link.toServer({ type: "PUNCHED", peer: name })),
    stuck: () => traversal.isOn() || traversal.begin(1),
    punchedOut: () => c.best() || calls.retryLater(),
    pong: (probe, way, rttMs) => ping.onEcho(probe, way, rttMs),
    echo(probe, way) {
      const isSent = carry({ type: "P2PECHO", probe }, [way]);
      if (!isSent) channel.open(); // one of us has logged in again
      return isSent;
    },
  });
  const traversal = createTraversal(io, c, { ...shared, ownKey: options.keys.public }, {
    newProbe: () => paths.newProbe(c.relay, true),
    isRetry: () => calls.isRetry(),
    attest: () => calls.ask(),
    tell: (plan) => carry(plan, c.best() ? [c.way(), c.relay] : [c.relay]),
    ended: () => paths.prune(),
  });
  const channel = createChannel(io, c, options, shared.switchboard, {
    payload: () => delivery.oldestPart() ?? { type: "P2PTRASH", probe: paths.newProbe(c.relay) },
    isNeeded: (tries) => !delivery.isIdle() || ping.isOn() || (delivery.isAckDue() && tries < MAX_ROUNDS),
    sendOpening(message, tries) {
      const mayCall = !delivery.isIdle() || ping.isOn(); // who only answers has been called
      for (let copy = 0; copy < Math.min(MAX_COPIES, tries); copy++) calls.viaServer(message, mayCall && copy === 0);
    },
    acknowledge: (session) => delivery.acknowledge((ack) => carry(ack, waysInUse(), { session })),
    handshake: () => delivery.onHandshake(),
    handshakeOver: (dueAt) => delivery.onHandshakeOver(dueAt),
    stream: (stream) => delivery.openStream(stream),
    session: () => identity.onProof(),
    heard: () => void (last.heard = io.now),
    mayAnswer: () => mayAnswer = c.isFriend() || shared.may("greet"),
    answered: () => delivery.owesAck(),
    untrusted: () => identity.warn(),
    ready: onSessionReady,
    frame: onFrame,
  });
  const delivery = createDelivery(io, c, channel.stream, {
    carry(part, isLate) {
      const path = c.best();
      if (!carry(part, isLate && path ? [path, c.relay] : waysInUse(), { mayCall: true })) return null;
      paths.expectAnswer();
      return path ?? c.relay;
    },
    needSession: () => channel.open(),
    talk: onTalk,
    progress: () => void (lastError = null),
  });
  const ping = createPing(io, c, {
    needSession: () => channel.open(),
    newProbe: (way) => paths.newProbe(way),
    send: (probe, way) => carry({ type: "P2PTRASH", probe }, [way]),
    talk: onTalk,
    timeout: () => failAll("timeout"),
  });
  const rooms = [channel, paths, traversal, calls, delivery, ping];

  function onPeer(peer: Introduced): boolean { // the server's word on who the peer is; false if it cannot be
    if (!identity.renew(peer)) return false;
    lastError = null;
    last.attested = io.now;
    calls.onAnswer();
    return true;
  }

  // -- what the client hears of the peer, and what the user wants

  const acts = {
    ...{ tellPath, failAll, onFirst: channel.onFirst, onJump: delivery.onJump },
    onPunched: paths.punchAgain, // the peer's hole is open, so our next punch will pass
    ...{ call: calls.ask, startPing: (count: number) => ping.begin(count) },
    onVerified(): void {
      identity.onProof();
      if (c.peer()) channel.befriend();
    },
    onMoved(): void { // the server knows where we are now, and has not heard what we said meanwhile
      calls.again();
      if (!c.best()) resendAll();
    },
    send(text: Uint8Array): void {
      if (!c.best() && !paths.isPunching() && !(calls.isWaiting() && c.hasSession())) calls.begin();
      if (c.peer()) channel.befriend();
      delivery.push(text);
    },
    onLogin(isAgain: boolean): void {
      channel.dropHandshake(); // it was begun under the nonce of the login before
      if (isAgain && c.isWarm()) calls.again();
      delivery.wake();
    },
    /** The list of users may say that the peer has logged in again: then what waits needs another session. */
    onUser(user: User): void {
      const before = c.peer()?.nonce;
      identity.onUser(user);
      if (c.peer()?.nonce !== before) delivery.wake();
    },
    onIntroduction(peer: Introduced): void {
      const isCurrent = c.peer()?.nonce === peer.nonce;
      if (!mayBeIntroduced(io.now) || !onPeer(peer)) return;
      // What we sent was for another login, or empty: the peer could do nothing with it, so it does not punch yet.
      if (isCurrent && channel.canPunch()) startPunching();
      else resendAll();
      resendOverdue();
    },
    /** The peer has asked for an introduction; `unwrap` takes what it sends us with that. */
    onCall(peer: Introduced, unwrap: (() => void) | null): void {
      if (!c.best() && !paths.isPunching()) calls.onCalled();
      if (!onPeer(peer)) return;
      mayAnswer = true;
      unwrap?.();
      if (isOver || !mayAnswer) return; // there are too many whom the user does not know
      // Sealed for a session that we have not, or no longer; or a call for punches, which we cannot seal any more.
      if ((unwrap || channel.wasOpen()) && !c.hasSession() && !identity.isUntrusted()) channel.open();
      if (!mayBeIntroduced(io.now)) return;
      startPunching();
      resendOverdue();
    },
    onError(reason: "unknown" | "offline"): void { // the server cannot pass something on
      // After the server's restart "unknown" only means that the peer is not back yet.
      const isNew = !channel.wasOpen() && !delivery.hasHeard() && io.now - link.forgottenAt() > ALL_BACK_MS;
      lastError = "offline"; // should we wait in vain
      calls.onAnswer();
      if ((reason === "offline" || !c.peer() || isNew) && !c.best()) failAll(reason);
    },
    close(): void {
      isOver = true; // whatever becomes of the rest
      for (const room of [traversal, paths, channel]) room.close();
    },
    wake(): void {
      delivery.giveUp(() => identity.isUntrusted() ? "untrusted" : lastError ?? "timeout");
      for (const room of rooms) room.wake();
    },
  };
  const conversation = {
    ...c,
    ...guardAll(io, acts),
    isUntrusted: identity.isUntrusted,
    /** How dear it is to us, in order of weight; null: something waits to be sent. */
    rank: () => delivery.isIdle() ? [Number(delivery.hasSent()), Number(c.best() !== null), last.talk] : null,
    wakeAt: () => dueAt ??= rooms.reduce((at, room) => Math.min(at, room.wakeAt()), Infinity),
  };
  return conversation;
}

// ---------------------------------------------------------------------------------------------------- paths
//
//     trying -- echo of our own punch --> good -- no answer in max(3 SRTT, 400 ms) --> suspect -- six probes --> lost
//                                          ^----------------- echo ----------------------'
//
// A path leads from one of our sockets to one endpoint of the peer. This room punches, holds the hole open while it is
// wanted, and notices when it is gone.
//
// Why both punch at once: the first packet of each opens its own NAT for the other's. One that comes earlier is dropped
// at best. A Linux router whose inside host has not sent yet may record it as a flow of its own; when our packet then
// leaves for there, that tuple is taken, and the NAT gives ours another port: the hole is where nobody looks. So first
// packets should cross (`punchAfterMs`), openers die on the way (OPENER_TTL), and a fresh socket gets a fresh port.
//
// Where a punch comes from beats what the server has told of the peer's endpoint: a NAT that gives each destination a
// port of its own (symmetric) shows the server another one than us, and the source is the port that is open to us. Only
// the host must be one that the server has seen, or an address on our own LAN: so nobody can aim us at a third party.
//
// The room gets sealed bytes: it knows no messages, no keys and no classes of NATs.

/** When we punch after an introduction: in quick succession, as packets get lost; then on, as the peer may be late. */
const PUNCH_AT_MS = [0, 20, 40, 80, 160, 320, 820, 1320, 1820, 2320, 2820, 3320, 3820, 4320];
/** A plain punch has so long; at the next step, which is 1,820 ms, fresh sockets with fresh mappings have their try. */
const FRESH_SOCKETS_AFTER_MS = 1_500;
/** A message went either way so recently: the path is checked all the time, and so often. */
const ACTIVE_MS = 10_000, ACTIVE_PROBE_MS = 400;
/** So often while the conversation is warm: under the 30 s after which the strictest NATs forget. */
const WARM_PROBE_MS = 15_000;
const SUSPECT_MS = 400; // something on the path unanswered for max(3 SRTT, this): suspect
/** A suspect path is probed so often; after so many probes without an echo we ask the server again, or give it up. */
const FAST_PROBE_MS = 150, PROBES_BEFORE_DOUBT = 2, FAST_PROBES = 6;
const STALE_PATH_MS = 30_000; // A path that nobody has answered on for so long is suspect as soon as it is needed.
/**
 * Some carriers end a mapping at a certain age, whatever the traffic: two paths in a row that die at about the same
 * age, each after 10 s and under 90 s; then the next one is replaced at 70 % of that age.
 */
const ABSOLUTE_LIFETIME_MS = 90_000, RENEWED_MS = 10_000, SAME_LIFETIME = 0.75, RENEW_AT = 0.7;
/** Of two paths of the same kind the quicker one is taken if it is quicker by this factor and this much. */
const QUICKER_FACTOR = 0.9, QUICKER_MS = 5;
const MAX_PATHS = 32, MAX_PROBES = 256;
/** To one peer: to hosts that have echoed, and to others. Sprays have a limit of their own. */
const PUNCHES_PER_PEER: Rate = { perSecond: 30, burst: 300 };
const FIRST_PUNCHES_PER_PEER: Rate = { perSecond: 10, burst: 60 };

function kindOf(endpoint: Endpoint): "direct" | "lan" {
  const scope = scopeOf(hostOf(endpoint));
  return scope === "private" || scope === "loopback" ? "lan" : "direct";
}

/** Whether to send where a server has told us to: to nothing on this link, on this host (unless it is there), or nowhere. */
function isUsable(endpoint: Endpoint, server: Endpoint): boolean {
  if (!parseEndpoint(endpoint)) return false;
  const scope = scopeOf(hostOf(endpoint));
  return scope === "public" || scope === "private" || (scope === "loopback" && scopeOf(hostOf(server)) === "loopback");
}

const newPath = (endpoint: Endpoint, socket: number, now: number) => ({
  kind: kindOf(endpoint),
  rtt: newEstimator(),
  endpoint,
  socket,
  state: "trying" as "trying" | "good" | "suspect", // trying: not proved, or not in use, although it works
  waitingSince: Infinity, // since when something sent on it waits for an answer
  answeredAt: now,
  bornAt: now,
  probeAt: Infinity,
  fastProbes: 0, // since it has become suspect
});
type Path = ReturnType<typeof newPath>;

const patience = ({ rtt }: Path) => Math.min(RTO_MAX_MS, Math.max(SUSPECT_MS, 3 * (rtt.srtt ?? 0)));

type PathEvent = "best" | "suspect" | "doubt" | "lost" | "ageing" | "punched" | "stuck" | "punchedOut";
function createPaths(
  io: Io,
  c: Context,
  attempt: { holds(socket: number): boolean; made(path: Path): boolean }, // to replace a path that still works
  on: Record<PathEvent, () => void> & {
    echo(probe: number, way: Way): boolean;
    pong(probe: number, way: Way, rttMs: number): void;
  },
) {
  let paths: Path[] = [], best: Path | null = null;
  /** Punches and pings that wait for their echo. One `toManyPorts` keeps waiting: whichever port answers is a path. */
  const probes = new Map<number, { way: Way; at: number; toManyPorts: boolean }>();
  /** How long the last two paths lived, and when to replace this one before it dies too. */
  let lifetimes: number[] = [], renewAt = Infinity;
  const punching = createScript(io), mayPunchMore = createLimit(PUNCHES_PER_PEER);
  const mayPunchFirst = createLimit(FIRST_PUNCHES_PER_PEER);
  /** Hosts that have echoed a probe: so the peer is there, whoever has named them. */
  const echoed = new Set<string>();
  const mayPunch = ({ endpoint }: Path) =>
    echoed.has(hostOf(endpoint))
      ? c.may("probe") && mayPunchMore(io.now)
      : c.may(c.isFriend() ? "punch" : "strangersPunch") && mayPunchFirst(io.now);

  /** Where the server has seen the peer, and its addresses on our LAN. */
  const candidates = () => c.canBeDirect() ? c.peer()?.candidates ?? [] : [];

  const over = (origin: Origin) =>
    paths.find(({ socket, endpoint }) => socket === origin?.socket && endpoint === origin.from) ?? null;

  /** The path from where something came, or to a candidate; null if the peer has no business there. */
  function pathTo(origin: Origin & object): Path | null {
    const found = over(origin), { from: endpoint, socket } = origin, host = hostOf(endpoint);
    if (found) return found;
    if (!candidates().some((candidate) => hostOf(candidate) === host)) return null;
    if (paths.length >= MAX_PATHS) {
      const spare = paths.find(({ state }) => state === "trying");
      drop((path) => path !== spare);
    }
    const path = newPath(endpoint, socket, io.now);
    paths.push(path);
    return path;
  }

  /** Forgets the paths that are not kept, and closes those of their sockets that nothing else needs. */
  function drop(isKept: (path: Path) => boolean): void {
    const gone = paths.filter((path) => !isKept(path));
    paths = paths.filter(isKept);
    for (const { socket } of gone) {
      if (!attempt.holds(socket) && !paths.some((path) => path.socket === socket)) io.close(socket);
    }
  }

  // -- punching

  function startPunching(afterMs: number): void {
    const startAt = io.now + afterMs;
    punching.begin(function* () {
      for (const at of PUNCH_AT_MS) {
        yield startAt + at;
        const good = best?.state === "good" ? best : null;
        const wanted = candidates().filter((endpoint) =>
          isUsable(endpoint, c.server()!.server) &&
          (!good || (kindOf(endpoint) === "lan" && good.kind !== "lan"))
        );
        for (const from of wanted) {
          const path = pathTo({ socket: 0, from });
          if (path) punch(path);
        }
        if (io.now >= startAt + FRESH_SOCKETS_AFTER_MS && !good) on.stuck();
        if (at === 0) on.punched();
        if (wanted.length === 0) break;
      }
      on.punchedOut();
    }());
  }

  function newProbe(way: Way, toManyPorts = false): number {
    const probe = randomNumber(io, 32);
    if (probes.size >= MAX_PROBES) probes.delete(probes.keys().next().value!);
    probes.set(probe, { way, at: io.now, toManyPorts });
    return probe;
  }

  /** Punches on a path; one in use waits for the echo, even if there is no session any more to seal the punch with. */
  function punch(path: Path, isPaid = false): void {
    if (path.state === "trying" && !isPaid && !mayPunch(path)) return;
    const data = c.punch(newProbe(path));
    if (data) io.send(path.socket, path.endpoint, data);
    if (path.state !== "trying") path.waitingSince = Math.min(path.waitingSince, io.now);
  }

  function onPunch(probe: number, origin: Origin): void {
    const path = origin && pathTo(origin);
    if (origin && !path) return;
    if (path?.state === "trying" && !mayPunch(path)) return;
    const isSent = on.echo(probe, path ?? c.relay);
    if (isSent && path?.state === "trying") punch(path, true); // it passed inwards, now ours will pass outwards
  }

  function onEcho(probe: number, origin: Origin): void {
    const asked = probes.get(probe);
    if (!asked) return;
    const way = asked.toManyPorts && origin ? pathTo(origin) : asked.way;
    if (!way || (way.kind === "relay" ? origin : way.endpoint !== origin?.from || way.socket !== origin.socket)) return;
    if (!asked.toManyPorts) probes.delete(probe);
    sample(way.rtt, io.now - asked.at);
    on.pong(probe, way, io.now - asked.at);
    if (way.kind === "relay") return;
    if (echoed.size < MAX_PATHS) echoed.add(hostOf(way.endpoint));
    onAnswer(way);
  }

  // -- the hole while it holds

  /** Something sent on a path has been answered over it: it works in both directions. */
  function onAnswer(path: Path): void {
    path.waitingSince = Infinity;
    path.answeredAt = io.now;
    const isBetter = !best || best.state !== "good" || (path.kind === "lan" && best.kind !== "lan") ||
      (path.kind === best.kind && path.rtt.srtt! < best.rtt.srtt! * QUICKER_FACTOR - QUICKER_MS) ||
      attempt.made(path);
    if (path !== best) return isBetter ? use(path) : undefined;
    path.state = "good";
    path.probeAt = nextProbeAt();
  }

  function use(path: Path | null): void {
    const age = best?.state === "suspect" ? io.now - best.bornAt : 0;
    if (age > RENEWED_MS) lifetimes = [...lifetimes.slice(-1), age];
    const [one = Infinity, other = 0] = lifetimes, shorter = Math.min(one, other), longer = Math.max(one, other);
    const isAbsolute = longer < ABSOLUTE_LIFETIME_MS && shorter > longer * SAME_LIFETIME;
    renewAt = path && isAbsolute ? io.now + shorter * RENEW_AT : Infinity;
    if (best) best.state = "trying";
    best = path;
    if (!path) return on.lost();
    path.state = "good";
    path.probeAt = nextProbeAt();
    on.best();
  }

  function nextProbeAt(): number {
    const silence = io.now - c.last.talk;
    return silence >= WARM_MS ? Infinity : io.now + (silence < ACTIVE_MS ? ACTIVE_PROBE_MS : spread(io, WARM_PROBE_MS));
  }

  // -- the hole when it does not hold

  function suspect(path: Path): void {
    path.state = "suspect";
    path.fastProbes = 0;
    path.probeAt = io.now;
    on.suspect();
  }

  function wakeBest(path: Path): void {
    if (path.state === "good" && io.now >= path.waitingSince + patience(path)) suspect(path);
    if (io.now < path.probeAt) return;
    if (path.state === "good") {
      punch(path);
      path.probeAt = nextProbeAt();
    } else if (path.fastProbes < FAST_PROBES) {
      punch(path);
      if (++path.fastProbes === PROBES_BEFORE_DOUBT) on.doubt();
      path.probeAt = io.now + (path.fastProbes < FAST_PROBES ? FAST_PROBE_MS : patience(path));
    } else {
      paths = paths.filter((other) => other !== path);
      io.close(path.socket);
      use(null);
    }
  }

  return {
    ...{ over, newProbe, startPunching, onPunch, onEcho, onAnswer, isPunching: punching.isOn },
    best: () => best,
    punchAgain(): void { // the peer's hole is open by now
      if (!punching.isOn() || best) return;
      for (const path of paths) if (path.state === "trying") punch(path);
    },
    expectAnswer(): void { // something has been sent that the peer answers
      if (best) best.waitingSince = Math.min(best.waitingSince, io.now);
    },
    onTalk(): void { // A message goes either way: the path is checked all the time from here on.
      if (!best) return;
      if (io.now - best.answeredAt > STALE_PATH_MS && best.state === "good") suspect(best);
      best.probeAt = Math.min(best.probeAt, io.now + ACTIVE_PROBE_MS);
    },
    prune(): void { // gives up every path, even one that works, unless it is in use or over socket 0
      for (const { socket } of paths) if (socket !== best?.socket) io.close(socket);
      paths = paths.filter(({ socket }) => socket === 0 || socket === best?.socket);
    },
    close: () => drop(() => false),
    wake(): void {
      punching.wake();
      if (best) wakeBest(best);
      if (io.now < renewAt) return;
      renewAt = Infinity;
      if (io.now - c.last.talk < ABSOLUTE_LIFETIME_MS) on.ageing();
    },
    wakeAt(): number {
      const suspectAt = best?.state === "good" ? best.waitingSince + patience(best) : Infinity;
      return Math.min(punching.wakeAt(), renewAt, best?.probeAt ?? Infinity, suspectAt);
    },
  };
}

// ---------------------------------------------------------------------------------------------------- discovery
//
// What the NAT before us is like (RFC 4787), found out by asking STUN servers how they see us (RFC 8489, RFC 5780):
//
//     the question                               what the answer tells
//     our socket 0 at the server's second port   another port outside than at the first: each destination gets its own
//     ... and at another address                 the same port everywhere: EIM; the same for each address: ADM
//     answer from a port never written to        it arrives: the filter looks at addresses at most, not at ports
//     answer from an address never written to    it arrives: there is no filter (EIF)
//     four fresh sockets, one after the other    which outside ports they get: preserving, in sequence, a block, any
//     two of ours at each other's outside ports  whether two clients behind this NAT can meet there (hairpin)
//
// Nothing here spoils a mapping that a punch will need. Classes are hints, packets are facts. The room knows no peers.

/** A question is asked again so often; what is unanswered then has been filtered, or lost. */
const QUESTION_MS = 250, QUESTION_TRIES = 4;
const SAMPLES = 4; // three random ports lie within a block by chance once in 80 times, four once in a thousand
/** Ports of successive mappings this near to each other are a sequence, or this near, a block. */
const SEQUENCE_STEP = 8, BLOCK_SPAN = 4_096;
const BLOCK_GUESS = 512; // we take a block to have so many ports, and those that we have seen lie anywhere in it
const LOWEST_PORT = 1_024, PORTS = 65_536 - LOWEST_PORT; // that a NAT gives away

/** `changeIp`, `changePort`: to be answered from the server's other address, or from another port of it. */
type Question = { socket: number; to: Endpoint; changeIp?: boolean; changePort?: boolean };
type Topic = "second port" | "third port" | "other address" | "unknown address" | "observer" | NumberedTopic;
type NumberedTopic = `${"sample" | "hairpin"} ${number}`;

/** What a discovery knows by now. */
const newFacts = ({ server, secondPort, public: seen }: ServerSession, isOwn: boolean) => ({
  server,
  secondPort, // of the server
  seen, // our public endpoint
  isOwn, // which is an address of this host: there is no NAT
  samples: [] as { socket: number; inside: number }[], // fresh sockets, in the order of their first packets
  answers: new Map<Topic, Stun | null | undefined>(), // undefined: not yet; null: none after all tries
  next: null as ServerSession | null, // our endpoint has changed meanwhile, so another discovery follows
});
type Facts = ReturnType<typeof newFacts>;

/** All that can be asked with what is known by now. */
function* questions(facts: Facts, observer: Endpoint | undefined): Generator<[Topic, Question]> {
  const { server, secondPort, seen, samples, answers } = facts, other = answers.get("second port")?.other;
  yield ["second port", { socket: 0, to: formatEndpoint(hostOf(server), secondPort) }];
  if (other) yield ["other address", { socket: 0, to: other }];
  if (observer) yield ["observer", { socket: 0, to: observer }];
  yield ["third port", { socket: 0, to: server, changePort: true }];
  for (const [i, { socket }] of samples.entries()) yield [`sample ${i}`, { socket, to: server }];
  if (answers.get("sample 0")?.other) { // not by socket 0, which has written to the other address
    yield ["unknown address", { socket: samples[0]!.socket, to: server, changeIp: true, changePort: true }];
  }
  // Both ways at once, since the mappings filter: a hairpin is a hole punched towards oneself.
  const lastSeen = answers.get(`sample ${SAMPLES - 1}`)?.mapped;
  if (!lastSeen || answeredSamples(facts).length < SAMPLES) return;
  yield ["hairpin 0", { socket: samples.at(-1)!.socket, to: seen }];
  yield ["hairpin 1", { socket: 0, to: lastSeen }];
}

const portOf = (endpoint: Endpoint | undefined) => endpoint ? parseEndpoint(endpoint)!.port : 0;
const answeredSamples = ({ samples, answers }: Facts) =>
  samples.map((sample, i) => ({ ...sample, outside: portOf(answers.get(`sample ${i}`)?.mapped) }))
    .filter(({ outside }) => outside > 0);

function mappingOf({ isOwn, seen, answers }: Facts): NatClass["mapping"] {
  const second = answers.get("second port")?.mapped;
  const elsewhere = answers.get("other address")?.mapped ?? answers.get("observer")?.mapped;
  if (isOwn) return "EIM";
  if (second !== undefined && second !== seen) return "APDM";
  return elsewhere === undefined ? "unknown" : elsewhere === seen ? "EIM" : "ADM"; // no other address to compare
}

function filteringOf({ answers }: Facts): NatClass["filtering"] {
  const port = answers.get("third port"), address = answers.get("unknown address");
  if (!port) return port === null ? "APDF" : "unknown";
  return address === undefined ? "unknown" : address ? "EIF" : "ADF";
}

function allocationOf(facts: Facts): NatClass["allocation"] {
  const samples = answeredSamples(facts), ports = samples.map(({ outside }) => outside);
  if (ports.length < SAMPLES - 1) return "unknown"; // one may be lost, four times over
  if (samples.every(({ inside, outside }) => inside === outside)) return "preserving";
  if (stepOf(ports) !== 0) return "sequential";
  return Math.max(...ports) - Math.min(...ports) <= BLOCK_SPAN ? "block" : "random";
}

function stepOf(ports: number[]): number { // the step of a sequence of ports, with its sign; 0 if it is none
  const steps = ports.slice(1).map((port, i) => port - ports[i]!), sign = Math.sign(steps[0] ?? 0);
  const isSequence = steps.every((step) => Math.sign(step) === sign && Math.abs(step) <= SEQUENCE_STEP);
  return isSequence ? sign * Math.min(...steps.map(Math.abs)) : 0;
}

type Discovery = ReturnType<typeof createDiscovery>;
function createDiscovery(
  io: Io,
  on: { isOwn(host: string): boolean; mayAsk(whom: Endpoint): boolean; changed(): void },
  observer?: Endpoint,
) {
  let known = UNKNOWN_NAT, canHairpin: boolean | null = null;
  let isNews = false; // what can be tried has changed, and the server, which tells our peers, has not confirmed it yet
  let ports: number[] = [], current: Facts | null = null; // of successive mappings, outside; the discovery under way
  const asked = new Map<string, { tries: ReturnType<typeof createScript>; done(answer: Stun | null): void }>();
  const waiting: (() => void)[] = [];

  /** Asks a STUN server how it sees one of our sockets; null after all tries: nothing has come back. */
  function ask({ socket, to, ...change }: Question, done: (answer: Stun | null) => void): void {
    const transaction = STUN_COOKIE + hex(io.random(12)), data = encodeStunRequest({ ...change, transaction });
    const tries = createScript(io);
    wake(); // older questions first
    asked.set(transaction, { tries, done });
    tries.begin(function* () {
      for (let i = 0; i < QUESTION_TRIES; i++) {
        if (on.mayAsk(to)) io.send(socket, to, data);
        yield io.now + QUESTION_MS;
      }
      asked.delete(transaction);
      done(null);
    }());
  }

  function receive(data: Uint8Array): void {
    const stun = decodeStun(data), question = stun && asked.get(stun.transaction);
    if (!question) return;
    if (stun.kind === "request") return void (canHairpin = true); // our own question, which comes by our public address
    asked.delete(stun.transaction);
    question.done(stun.kind === "response" ? stun : null);
  }

  function start(session: ServerSession): void { // one discovery at a time
    if (isIPv6(session.server)) return;
    if (current) return void (current.next = session);
    const facts = current = newFacts(session, on.isOwn(hostOf(session.public)));
    canHairpin = null;
    goOn(facts);
    for (let i = 0; i < SAMPLES; i++) {
      io.open((socket, inside) => {
        if (facts !== current) return io.close(socket);
        facts.samples.push({ socket, inside });
        goOn(facts);
      });
    }
  }

  /** Asks what can be asked by now and has not been asked yet; ends the discovery when everything is answered. */
  function goOn(facts: Facts): void {
    if (facts !== current) return; // a bug has ended it
    try {
      askMore(facts);
    } catch (error) {
      end(facts); // the next one may go better
      throw error;
    }
  }

  function askMore(facts: Facts): void {
    const { samples, answers } = facts;
    for (const [topic, question] of questions(facts, observer)) {
      if (answers.has(topic) || !isUsable(question.to, facts.server)) continue;
      answers.set(topic, undefined);
      if (topic === "hairpin 0") canHairpin = false;
      ask(question, (answer) => {
        answers.set(topic, answer);
        goOn(facts);
      });
    }
    const pending = [...answers.keys()].filter((topic) => answers.get(topic) === undefined);
    const isHalf = pending.some((topic) => topic === "second port" || topic.startsWith("sample")); // it would mislead
    if (samples.length < SAMPLES) return;
    if (!facts.next && !isHalf) believe(facts);
    if (pending.length > 0) return;
    end(facts);
  }

  function end({ samples, next }: Facts): void {
    for (const { socket } of samples) io.close(socket);
    current = null;
    if (next) start(next);
    if (!current) { for (const tell of waiting.splice(0)) tell(); }
  }

  function believe(facts: Facts): void {
    const found = { mapping: mappingOf(facts), filtering: filteringOf(facts), allocation: allocationOf(facts) };
    ports = answeredSamples(facts).map(({ outside }) => outside);
    if (JSON.stringify(found) === JSON.stringify(known)) return;
    isNews ||= isSymmetric(found) !== isSymmetric(known) ||
      (isSymmetric(found) && found.allocation !== known.allocation);
    known = found;
    on.changed();
  }

  function confirm(): boolean { // the server knows our class by now; true if that is news to it
    const wasNews = isNews;
    isNews = false;
    return wasNews;
  }

  const whenDone = (tell: () => void) => current ? void waiting.push(tell) : tell(); // calls back, perhaps at once
  const isAsking = () => asked.size > 0, nat = () => known, hairpin = () => canHairpin;
  const stride = () => stepOf(ports) || 1; // from one port of a sequence to the next
  const inRange = (port: number) => Math.min(65_535, Math.max(LOWEST_PORT, port));
  const block = () => [Math.max(...ports) - BLOCK_GUESS, Math.min(...ports) + BLOCK_GUESS].map(inRange);
  const wake = () => asked.forEach(({ tries }) => tries.wake());
  const wakeAt = () => Math.min(...[...asked.values()].map(({ tries }) => tries.wakeAt()));
  return { ask, receive, start, confirm, whenDone, isAsking, nat, hairpin, stride, block, wake, wakeAt };
}

// ---------------------------------------------------------------------------------------------------- traversal
//
// A symmetric NAT gives each destination another outside port, so the one that the server sees is not the one that the
// peer can reach. What helps depends on both NATs:
//
//     ours \ theirs     EIM                        symmetric, predictable        symmetric, random
//     EIM               a fresh socket each: the   from one socket to all that   spray: to 2,048 ports of theirs,
//                       old port may be spoilt     they tell: one is right       of which 256 are open to us
//     symmetric,        open a few, tell which:    the i-th packet of each to    none: each try uses up one of our
//     predictable       the first try is to hit    the i-th port of the other    ports too, so both must match
//     symmetric,        open 256, so that every    none                          none
//     random            252nd port is right
//
// A spray, at 200 probes a second; each opener makes its socket a mapping that lets in one endpoint of the peer:
//
//     random side                    its NAT                          EIM side
//     socket 1   -- opener --> | :50211, for the peer |      X <-- probe to :1024
//     ...                      | ...                  |      X <-- probe to :7731
//     socket 256 -- opener --> | :23007, for the peer | <--------- probe to :23007, a hit
//                -- echo ----> | :23007               | ---------> this is the path
//
// 256 of 64,512 ports are open, so a probe hits with odds of 1 in 252. In half of all cases 175 probes are enough
// (0.9 s), in 1 - (1 - 256/64512)^1024 = 98 % the first half of the spray. If the ports of both sides are random, both
// must match at once: that would take some hundred thousand probes.
//
// An attempt is one cell of the table, as the other side plays it too; plans, told over the relay, see to that. If one
// fails, the next one may take a NAT for another kind, see `takenFor`. Knows no messages and no keys.

const OPENER_TTL = 8; // opens our NAT, and dies before it can spoil a port of the peer's, see "paths"
const FOREIGN_FLOWS = 4; // may have taken ports of a sequence since it was sampled: so many are guessed in turn
const TELL_PLAN_MS = 300; // when a plan is told again
const MAX_ATTEMPT = 4, RENEWAL = 100; // the last attempt; the number of one that replaces a path which still works
const ATTEMPTS_PER_PEER: Rate = { perSecond: 0.2, burst: 6 };
/**
 * A spray: so many ports, 4 each 20 ms, a little ahead at first; half of them, a pause, the other half; never more. In
 * the pause the random side opens again: openers may be lost, or die inside a NAT of its own that is farther away.
 */
const SPRAY_PORTS = 2_048, SPRAY_BURST = 4, SPRAY_BURST_MS = 20, SPRAY_AHEAD_MS = 60, SPRAY_PAUSE_MS = 1_000;
const SPRAY_MS = 13_000; // 10.2 s of probes, 1 s of pause, and a little for the last echo
const SPRAY_INTERVAL_MS = 14_000; // one spray at a time on this host, so long one after the other
/** What the peer, and the server, have said so recently still holds; while it does not, so often we look again. */
const CONSENT_MS = 3_000, ATTESTED_MS = 20_000, CONSENT_CHECK_MS = 500;

/** How many sockets we open (none: socket 0 serves), when we send by them, and when the attempt has failed. */
type Cell = { sockets: number; sendAtMs: number[]; endMs: number };
type Kind = "EIM" | "predictable" | "random";
/** The table above; what is not in it is hopeless. Who opens a NAT sends again after the peer has begun to. */
const CELLS: Partial<Record<`${Kind} x ${Kind}`, Cell>> = {
  "EIM x EIM": { sockets: 1, sendAtMs: [0, 100, 250], endMs: 1_000 },
  "EIM x predictable": { sockets: 0, sendAtMs: [0, 100, 250], endMs: 1_000 },
  "EIM x random": { sockets: 0, sendAtMs: [0, 100, 250], endMs: SPRAY_MS },
  "predictable x EIM": { sockets: 4, sendAtMs: [0, 500], endMs: 1_000 }, // a few do, because the peer tries many ports
  "predictable x predictable": { sockets: 16, sendAtMs: [0, 100, 250], endMs: 1_000 }, // one guess each
  // Again at about the end of the pause: after 1,024 ports at 200 a second; the 80 ms are our plan's way to the peer.
  "random x EIM": { sockets: 256, sendAtMs: [0, 5_120 + SPRAY_PAUSE_MS + 80], endMs: SPRAY_MS },
};

type Plan = Peer & { type: "P2PPLAN" };
type SprayTurn = { takenAt: number }; // of all conversations of this host
/** `careful`: a spray's second openers die on the way too; not once that has failed, as our NAT may be farther away. */
type Start = { number: number; ours: Kind; theirs: Kind; cell: Cell; careful: boolean; peerPlan: Plan | null };
const newAttempt = (start: Start, now: number) => ({
  ...start,
  opens: start.ours !== "EIM" && start.theirs === "EIM", // our NAT towards one known port of the peer, which finds ours
  startedAt: now,
  endAt: now + start.cell.endMs,
  sockets: [] as { socket: number; port: number }[], // opened for it
  plan: null as Plan | null, // ours
  tellAt: 0, // when it is told (again); Infinity: not before there is a session
  counter: 0, // the socket that shows which outside port is the latest; 0: none
  isSending: false,
  isSpraying: false, // or has sprayed
});
type Attempt = ReturnType<typeof newAttempt>;

/** So much goes where a peer says that it is only while the peer goes on saying so, and the server too. */
const isConsenting = ({ last }: Context, now: number) =>
  now - last.heard < CONSENT_MS && now - last.attested < ATTESTED_MS;

/**
 * What an attempt takes a NAT for. A known mapping is believed every time. An unknown one (a single server cannot tell
 * EIM from ADM) is EIM at first. From attempt 2 on it may be symmetric: in 2 and 4 if its ports can be predicted, which
 * costs little; else random, in 2 or 3, while the other is EIM. `isFirst`: that side has the lower key, and so has 2.
 */
function takenFor(who: NatClass, other: NatClass, { number, isFirst }: { number: number; isFirst: boolean }): Kind {
  if (isSymmetric(who)) return isPredictable(who) ? "predictable" : "random";
  if (who.mapping !== "unknown" || number < 2) return "EIM";
  if (isPredictable(who)) return number === 3 || isRandom(other) ? "EIM" : "predictable";
  if (isSymmetric(other)) return "EIM";
  const comesFirst = other.mapping !== "unknown" || (!isPredictable(other) && isFirst);
  return number === (comesFirst ? 2 : 3) ? "random" : "EIM";
}

function createTraversal(
  io: Io,
  c: Context,
  host: { discovery: Discovery; sprayTurn: SprayTurn; hasSockets(count: number): boolean; ownKey: Uint8Array },
  on: { newProbe(): number; isRetry(): boolean; tell(plan: Plan): boolean; attest(): void; ended(): void },
) {
  const { discovery, sprayTurn } = host, { best } = c, mayAttempt = createLimit(ATTEMPTS_PER_PEER);
  const sending = createScript(io);
  let attempt: Attempt | null = null;

  /** Whether the attempt is there to replace that path, which still works. */
  const isOld = (path: Path | null) => attempt?.number === RENEWAL && path !== null && path.bornAt < attempt.startedAt;
  const isSettled = () => best()?.state === "good" && !isOld(best()); // nothing is left for an attempt to do
  const isFirst = () => isLower(host.ownKey, c.peer()!.key); // of the two of us, where both would do the same
  /** The peer as the server sees it. */
  const target = () =>
    c.peer()!.candidates.findLast((endpoint) => !isIPv6(endpoint) && isUsable(endpoint, c.server()!.server));
  const nat = () => discovery.nat(), peerNat = () => c.peer()!.nat;

  function onIntroduction(): void {
    const symmetric = isSymmetric(nat()), { filtering } = symmetric ? peerNat() : nat();
    if (best() || !(symmetric || isSymmetric(peerNat()))) return; // plain punches will do,
    if (filtering === "EIF" || filtering === "ADF") return; // as they do if the other one lets in any port
    if (!attempt) return begin(0);
    const fits = (attempt.ours !== "EIM") === symmetric && (attempt.theirs !== "EIM") === isSymmetric(peerNat());
    if (attempt.number > 1 || fits) return;
    // Begun before somebody's class of NAT was known: with other sockets, or other targets.
    if (symmetric) begin(attempt.number + 1);
    else if (!attempt.isSpraying) begin(attempt.number, attempt.peerPlan);
  }

  function begin(number: number, peerPlan: Plan | null = null): void { // begins an attempt, if it is not hopeless
    const ours = takenFor(nat(), peerNat(), { number, isFirst: isFirst() }), to = target();
    const theirs = takenFor(peerNat(), nat(), { number, isFirst: !isFirst() }), cell = CELLS[`${ours} x ${theirs}`];
    end();
    if (!mayAttempt(io.now) || !cell || !host.hasSockets(cell.sockets)) return;
    if (number === RENEWAL ? isRandom(nat()) || isRandom(peerNat()) : number > MAX_ATTEMPT) return; // never by a spray
    // Behind our own NAT, which does not hairpin: nothing that is sent to its public address arrives.
    if (to && hostOf(to) === hostOf(c.server()!.public) && discovery.hairpin() === false) return;
    const careful = ours === "random" && !on.isRetry();
    const mine = attempt = newAttempt({ number, ours, theirs, cell, careful, peerPlan }, io.now);
    goOn(mine);
    if (cell.sockets === 0) makePlan(mine);
    let left = cell.sockets;
    for (let i = 0; i < cell.sockets; i++) {
      io.open((socket, port) => {
        if (attempt !== mine) return io.close(socket);
        if (port > 0) mine.sockets.push({ socket, port });
        if (--left === 0) makePlan(mine);
      });
    }
  }

  /** Which outside ports our next packets to the peer will have, each from a socket that has sent nothing yet. */
  function makePlan(mine: Attempt): void {
    const own = c.server()!, { allocation } = nat(), [first] = mine.sockets;
    const askOutside = (socket: number, then: (port: number) => void) =>
      discovery.ask({ socket, to: own.server }, io.guard((answer) => then(portOf(answer?.mapped))));
    // Nothing to predict; but the peer, who has something, must hear that the path is to be replaced.
    if (!first) return mine.number === RENEWAL ? announce(mine, [portOf(own.public)]) : undefined;
    if (mine.ours === "EIM") return askOutside(first.socket, (port) => port > 0 && announce(mine, [port]));
    if (mine.ours === "random") return announce(mine, allocation === "block" ? discovery.block() : []);
    if (allocation === "preserving") return announce(mine, mine.sockets.map(({ port }) => port));
    // A socket that is good for nothing else shows the counter as it stands now.
    io.open((socket) => {
      mine.counter = socket;
      askOutside(socket, (last) => {
        io.close(socket);
        const next = Array.from({ length: MAX_PLANNED_PORTS }, (_, i) => last + (i + 1) * discovery.stride());
        if (last > 0) announce(mine, next.filter((port) => port > 0 && port < 65_536));
      });
    });
  }

  function announce(mine: Attempt, ports: number[]): void {
    if (attempt !== mine) return;
    mine.plan = { type: "P2PPLAN", attempt: mine.number, spray: Number(mine.ours === "random"), ports };
    goOn(mine);
  }

  function onPlan(peerPlan: Plan): void {
    const path = best(), { attempt: number } = peerPlan;
    const isWanted = path?.state !== "good" || (number === RENEWAL && io.now - path.bornAt > RENEWED_MS);
    if (!c.canBeDirect() || !isWanted) return;
    if (!attempt || number > attempt.number) begin(number);
    if (!attempt || attempt.peerPlan || number !== attempt.number) return;
    attempt.peerPlan = peerPlan;
    goOn(attempt);
  }

  function onSessionReady(): void { // a plan has waited for it
    if (!attempt) return;
    if (attempt.plan && attempt.tellAt === Infinity) attempt.tellAt = io.now;
    goOn(attempt);
  }

  /** Tells our plan when that is due, and sends as soon as both sides know where. */
  function goOn(mine: Attempt): void {
    if (mine.plan && io.now >= mine.tellAt) mine.tellAt = on.tell(mine.plan) ? io.now + TELL_PLAN_MS : Infinity;
    // We must have our plan, unless socket 0 serves, and know where to: by the peer's plan, or its one known port.
    if (mine.isSending || !(mine.plan || mine.cell.sockets === 0) || !(mine.peerPlan || mine.opens)) return;
    if (c.last.heard === -Infinity) return; // perhaps only the server says that there is such a peer
    mine.isSending = true;
    sending.begin(send(mine));
  }

  function* send(mine: Attempt): Generator<number, void> {
    const startAt = io.now;
    for (const at of mine.cell.sendAtMs) {
      yield startAt + at;
      if (!target() || isSettled()) continue;
      // Only the EIM side sprays, and only if the peer's plan asks for that.
      if (!mine.peerPlan?.spray || mine.ours !== "EIM") sendVolley(mine, at === 0);
      else if (io.now - sprayTurn.takenAt >= SPRAY_INTERVAL_MS) return yield* sprayPorts(mine, mine.peerPlan.ports);
    }
  }

  function sendVolley(mine: Attempt, isFirstOne: boolean): void {
    const probe = on.newProbe(), ttl = mine.opens && (isFirstOne || mine.careful) ? OPENER_TTL : undefined;
    const told = mine.peerPlan?.ports ?? [], ports = mine.opens ? [told[0] ?? portOf(target())] : told;
    // Against another counter: ours may be off by foreign flows, hence one side guesses how many there were.
    const guesses = peerNat().allocation === "sequential" && (nat().allocation === "preserving" || isFirst());
    for (const [i, { socket }] of (mine.sockets.length > 0 ? mine.sockets : [{ socket: 0 }]).entries()) {
      const ith = i + (guesses ? i % FOREIGN_FLOWS : 0), isAny = mine.opens || mine.ours === "EIM";
      for (const port of isAny ? ports : ports.slice(ith, ith + 1)) sendProbe(port, { probe, socket, ttl });
    }
  }

  /** A punch to a port that may be open to us, beyond the limit for each peer. False: that of the host is reached. */
  function sendProbe(port: number, by: { probe: number; socket: number; ttl?: number | undefined }): boolean {
    if (port === 0) return true; // a peer may name any
    const mayProbe = c.may("probe"), data = mayProbe && c.punch(by.probe);
    if (data) io.send(by.socket, formatEndpoint(hostOf(target()!), port), data, by.ttl);
    return mayProbe;
  }

  /** Sends to 2,048 ports in bursts: first those of the peer's block, if it told one; then any, none of these twice. */
  function* sprayPorts(mine: Attempt, [low = 0, high = -1]: number[]): Generator<number, void> {
    sprayTurn.takenAt = io.now;
    mine.isSpraying = true;
    mine.endAt = io.now + SPRAY_MS;
    const first = randomNumber(io, 16);
    let stride = randomNumber(io, 16) | 1, at = io.now - SPRAY_AHEAD_MS;
    while (stride % 3 === 0 || stride % 7 === 0) stride += 2; // so it visits each of the 64,512 = 2^10 x 3^2 x 7 ports
    const portAt = (n: number) => n <= high - low ? low + n : LOWEST_PORT + (first + n * stride) % PORTS;
    for (let next = 0; next < SPRAY_PORTS;) {
      yield at;
      if (!target()) return; // the peer is not there any more
      if (!isConsenting(c, io.now)) {
        if (io.now - c.last.attested >= ATTESTED_MS) on.attest();
        at = io.now + CONSENT_CHECK_MS;
        continue;
      }
      const probe = on.newProbe(), isFirstHalf = next < SPRAY_PORTS / 2;
      for (let sent = 0; sent < SPRAY_BURST && sendProbe(portAt(next), { probe, socket: 0 }); sent++) next++;
      at += isFirstHalf && next >= SPRAY_PORTS / 2 ? SPRAY_PAUSE_MS : SPRAY_BURST_MS;
    }
  }

  function end(): void { // closes the attempt's sockets, all but the one in use
    for (const { socket } of attempt?.sockets ?? []) if (socket !== best()?.socket) io.close(socket);
    if (attempt) io.close(attempt.counter);
    if (attempt) on.ended();
    attempt = null;
    sending.stop();
  }

  function wake(): void {
    if (!attempt) return;
    goOn(attempt);
    if (io.now >= sendAt()) sending.wake();
    if (io.now < attempt.endAt) return;
    const again = !best() && attempt.number < RENEWAL && !isRandom(nat()) && !isRandom(peerNat());
    return again ? begin(attempt.number + 1) : end(); // another spray right away would have no better odds
  }

  function onBest(): void {
    if (attempt?.isSpraying) sprayTurn.takenAt = -Infinity;
  }

  const sendAt = () => attempt?.isSpraying && isSettled() ? Infinity : sending.wakeAt(); // a spray waits meanwhile
  const wakeAt = () => attempt ? Math.min(attempt.endAt, attempt.plan ? attempt.tellAt : Infinity, sendAt()) : Infinity;
  const isOn = () => attempt !== null, made = (path: Path) => isOld(best()) && !isOld(path);
  const holds = (socket: number) => attempt?.sockets.some((one) => one.socket === socket) ?? false;
  return { begin, close: end, onIntroduction, onSessionReady, onPlan, onBest, isOn, holds, made, wake, wakeAt };
}

// ==================================================================================================== reference
//
// The lesson ends here. What follows can be skipped at first reading: keys, delivery, lists and the command line.

// ---------------------------------------------------------------------------------------------------- identity
//
// Who the peer is: the server's latest word on its key and its login, and the user's, who may have verified a key.

function createIdentity(
  io: Io,
  { name, isTrusted }: Context,
  { known, isSelf, ownKey }: { known: User | undefined; isSelf: boolean; ownKey: Uint8Array },
  on: { otherLogin(): void; untrusted(): void; mayWarn(): boolean },
) {
  let peer: Introduced | null = known ? { ...known, candidates: [], nat: UNKNOWN_NAT, punchAfterMs: 0 } : null;
  let isHidden = known?.public === ""; // nobody is told where it is
  let isImpostor = false; // it does not know what it must know
  let warnedOf: string | null = null; // the login of an impostor that the user has heard of

  const isUntrusted = () => peer !== null && (isImpostor || !isTrusted(peer.key));

  function renew(now: Introduced): boolean { // takes the server's word on who the peer is now; false if it cannot be
    if (sameKey(now.key, ownKey) && !isSelf) return false; // our own messages would come back as somebody else's
    const hasOtherKey = peer !== null && !sameKey(now.key, peer.key);
    if (hasOtherKey) {
      const message = `The key of "${name}" has changed: it was started again, or somebody else is in its place. ` +
        `Compare again with: verify ${name}`;
      io.emit({ event: "error", code: "key-changed", message, notice: true });
    }
    if (hasOtherKey || (peer && peer.nonce !== now.nonce)) on.otherLogin();
    peer = now;
    isHidden = now.candidates.length === 0;
    isImpostor = false;
    if (isUntrusted()) on.untrusted();
    return !isUntrusted();
  }

  return {
    ...{ renew, isUntrusted },
    peer: () => peer,
    isHidden: () => isHidden,
    onProof: () => void (isImpostor = false), // a session with it, or the user's word
    onUser({ nonce, key, public: endpoint }: User): void {
      if (!peer || peer.nonce === nonce) return;
      renew({ ...peer, nonce, key });
      isHidden = endpoint === "";
    },
    warn(): void { // somebody passes for the peer
      isImpostor = true;
      if (warnedOf === peer!.nonce || !on.mayWarn()) return;
      warnedOf = peer!.nonce;
      const what = "tries to talk to us but holds other keys or another secret: compare your --secret-file";
      io.emit({ event: "error", code: "untrusted", message: `"${name}" ${what}`, notice: true });
    },
  };
}

// ---------------------------------------------------------------------------------------------------- channel
//
//     P2PFIRST  ----------->   Noise KKpsk0; the oldest message travels inside, so it costs no round trip
//     <----------- P2PSECOND   with something sealed behind it; until this has arrived, its copies are our punches
//     sealed  <----------->    from here on everything has an index, a counter and a tag
//
// Sessions with the peer: keys that only the two of us know, made again with each login. Knows no sequence numbers, no
// paths and no server.

const REKEY_AFTER = 2 ** 30; // AES-GCM keys are changed long before 2^32 messages.
const HANDSHAKES_PER_PEER: Rate = { perSecond: 5, burst: 20 };
/** Sessions of one peer, first messages that we remember, and bytes of the name of a stream. */
const MAX_SESSIONS = 4, MAX_EPHEMERALS = 4_096, STREAM_BYTES = 8;
/** Logins of which we remember the last first message: of those whom the user knows, and of others. */
const MAX_FIRSTS = 4_096;

interface PeerSession {
  index: number; // ours, in what we receive
  theirs: number; // in what we send
  keys: NoiseKeys;
  window: ReplayWindow;
  sent: number;
  peer: Introduced; // when it began
  stream: string; // what numbers the peer's parts
  second: Uint8Array | null; // we answered, and the peer has not shown yet that it knows: all that we send carries this
}

/** We are opening a session: first by asking the server who that is, then with a handshake. */
type Opening = { tries: number; dueAt: number; handshake: { index: number; initiation: Initiation } | null };

/**
 * First messages say the sender's clock (in ms, as WireGuard's say TAI64N): of one login, only a later one than the last
 * counts. So none counts twice, even when its ephemeral key is forgotten. However many others write, they do not make us
 * forget those whom the user knows. What was meant for an earlier login of ours cannot be opened in this one anyway.
 */
function createFirsts() {
  const friends = new Map<string, number>(), others = new Map<string, number>(); // by login: the clock
  let sent = 0;
  const clockOf = (login: string) => friends.get(login) ?? others.get(login) ?? -1;
  function set(login: string, clock: number, isFriend: boolean): void {
    const map = isFriend ? friends : others;
    for (const all of [friends, others]) all.delete(login);
    if (map.size >= MAX_FIRSTS) map.delete(map.keys().next().value!);
    map.set(login, clock);
  }
  return {
    next: (now: number) => sent = Math.max(sent + 1, Math.floor(now)),
    accept(login: string, clock: number, isFriend: boolean): boolean {
      const isLater = clock > clockOf(login);
      if (isLater) set(login, clock, isFriend);
      return isLater;
    },
    befriend: (login: string) => set(login, clockOf(login), true),
  };
}

/** What may travel inside a first message. Anything else must wait until the peer has shown that it is there. */
const IN_FIRST: Peer["type"][] = ["P2PMESSAGE", "P2PTRASH"];

type First = Handshake & { type: "P2PFIRST" };
type Second = Handshake & { type: "P2PSECOND" };

/** Whose a datagram is: that says the index that we chose, or for a first message its ephemeral key. */
const createSwitchboard = () => ({
  byIndex: new Map<number, Line>(),
  byEphemeral: new Map<string, OnCopy>(),
  firsts: createFirsts(),
});
type Switchboard = ReturnType<typeof createSwitchboard>;
type Line = { onSecond(message: Second, origin: Origin): void; onSealed(data: Uint8Array, origin: Origin): void };
type OnCopy = (probe: number, origin: Origin) => void; // another copy of a first message that we have had
const ephemeralOf = ({ noise }: First) => hex(noise.subarray(0, 32));
const loginOf = ({ nonce, key }: Introduced) => `${nonce} ${hex(key)}`;

function createChannel(
  io: Io,
  { relay, server, peer, isTrusted, isFriend }: Context,
  options: ClientOptions,
  { byIndex, byEphemeral, firsts }: Switchboard,
  on: Record<"handshake" | "session" | "answered" | "untrusted" | "ready", () => void> & {
    payload(): Peer; // what travels inside the first message
    isNeeded(tries: number): boolean; // whether anything still waits for a session
    sendOpening(message: Uint8Array, tries: number): void;
    acknowledge(session: PeerSession): void;
    handshakeOver(dueAt: number): void; // who has waited for it is due then
    stream(stream: string): void;
    frame(frame: Peer, origin: Origin, stream: string): void;
    heard(): void; // the peer has shown that it is in the session
    mayAnswer(): boolean; // a first message: it costs us several X25519
  },
) {
  const { name, keys, psk = new Uint8Array(32) } = options;
  const ownStream = io.random(STREAM_BYTES), mayBegin = createLimit(HANDSHAKES_PER_PEER);
  const sessions: PeerSession[] = []; // those that the peer may still use, newest first
  let inUse: PeerSession | null = null; // the one that we use
  let opening: Opening | null = null;

  function current(): PeerSession | null { // the session that we seal with; none if the peer has logged in again since
    const now = peer();
    return inUse && now && inUse.peer.nonce === now.nonce && sameKey(inUse.peer.key, now.key) ? inUse : null;
  }

  // -- opening

  function newIndex(): number {
    const index = randomNumber(io, 32);
    return byIndex.has(index) ? newIndex() : index;
  }

  /** A handshake succeeds if both mean the same: who with whom, in which login of each. Names have no blanks. */
  function handshakeWith(them: Introduced, isOurs: boolean) {
    const us = { name, nonce: server()!.nonce }, [from, to] = isOurs ? [us, them] : [them, us];
    const prologue = utf8.encode(`punch ${from.name} ${from.nonce} ${to.name} ${to.nonce}`);
    return { own: keys, peer: them.key, psk, prologue, ephemeral: options.generateKeys() };
  }

  function dropHandshake(): void { // another one follows at once
    if (!opening?.handshake) return;
    byIndex.delete(opening.handshake.index);
    opening = { tries: 0, dueAt: io.now, handshake: null };
    on.handshakeOver(io.now);
  }

  function open(): void { // opens a session if there is none, or if it is worn
    if (!opening && (!current() || inUse!.sent > REKEY_AFTER)) sendOpening();
  }

  function sendOpening(): void {
    if (!server()) return;
    const now = peer();
    opening ??= { tries: 0, dueAt: io.now, handshake: null };
    opening.handshake ??= now && beginHandshake(now);
    opening.dueAt = io.now + timeout(relay.rtt, ++opening.tries);
    on.sendOpening(firstHandshake() ?? NO_BYTES, opening.tries);
  }

  function beginHandshake(now: Introduced): Opening["handshake"] {
    const payload = concat(ownStream, encodeClock(firsts.next(io.now)), encodeInner(on.payload()));
    const initiation = initiate(handshakeWith(now, true), payload);
    if (!initiation) return null;
    on.handshake();
    const index = newIndex();
    byIndex.set(index, line);
    return { index, initiation };
  }

  function firstHandshake(probe = 0): Uint8Array | null {
    if (!opening?.handshake) return null;
    const { index, initiation } = opening.handshake;
    return encodeHandshake({ type: "P2PFIRST", from: index, probe, noise: initiation.message });
  }

  function onFirst(message: First): void {
    const now = peer();
    if (!now || !server() || !isTrusted(now.key) || !mayBegin(io.now) || !on.mayAnswer()) return;
    const response = respond(handshakeWith(now, false), message.noise);
    const inner = response && decodeInner(response.payload.subarray(STREAM_BYTES + CLOCK_BYTES));
    if (!response || !inner || !IN_FIRST.includes(inner.type)) return on.untrusted();
    const stream = hex(response.payload.subarray(0, STREAM_BYTES));
    const clock = decodeClock(response.payload.subarray(STREAM_BYTES));
    if (!firsts.accept(loginOf(now), clock, isFriend())) return; // somebody shows us an old one
    let session: PeerSession | null = null;
    // If we have begun too, the handshake of the lower key goes on, and the other one only brings its payload.
    if (!opening?.handshake || !isLower(keys.public, now.key)) {
      const { message: second, keys: made } = response.answer(ownStream);
      session = newSession({ index: newIndex(), theirs: message.from, keys: made, stream, second });
      dropHandshake();
      opening = null;
    }
    if (byEphemeral.size >= MAX_EPHEMERALS) byEphemeral.delete(byEphemeral.keys().next().value!);
    byEphemeral.set(ephemeralOf(message), io.guard((probe, origin) => session && onCopy(session, probe, origin)));
    on.stream(stream);
    on.frame(inner, null, stream);
    if (session && session !== inUse) on.acknowledge(session);
  }

  function onCopy(session: PeerSession, probe: number, origin: Origin): void {
    if (!session.second) return; // the peer has our answer
    if (!origin) on.acknowledge(session); // our answer was lost
    else if (session === inUse) on.frame({ type: "P2PTRASH", probe }, origin, session.stream);
  }

  // A session that the peer began replaces a working one only when the peer has used it: its first message may have
  // been long on the way, and the peer have forgotten it.
  function newSession(made: Omit<PeerSession, "window" | "sent" | "peer">): PeerSession {
    const session = { ...made, window: replayWindow(), sent: 0, peer: peer()! }, works = current() && !inUse!.second;
    sessions.unshift(session);
    for (const { index } of sessions.splice(MAX_SESSIONS)) byIndex.delete(index);
    if (!session.second || !works) inUse = session;
    byIndex.set(session.index, line);
    on.session();
    return session;
  }

  // -- sealing

  function seal(frame: Peer, session: PeerSession): Uint8Array {
    const { theirs: to, index: from, second: noise, keys } = session;
    const sealed = sealPeer(frame, { index: to, counter: session.sent++, key: keys.send });
    return noise ? encodeHandshake({ type: "P2PSECOND", to, from, noise, sealed }) : sealed;
  }

  const line: Line = {
    onSecond: io.guard(({ to, from, noise, sealed }, origin) => {
      const finished = opening?.handshake?.index === to ? opening.handshake.initiation.finish(noise) : null;
      if (finished?.payload.length === STREAM_BYTES) {
        const stream = hex(finished.payload);
        opening = null;
        newSession({ index: to, theirs: from, keys: finished.keys, stream, second: null });
        on.stream(stream);
        on.answered(); // the peer takes the new session when we have used it, see `newSession`
        on.handshakeOver(io.now + timeout(relay.rtt, 1));
      }
      line.onSealed(sealed, origin);
      on.ready();
    }),
    onSealed: io.guard((data, origin) => {
      const header = peerHeader(data), session = sessions.find(({ index }) => index === header?.index);
      if (!header || !session || !isTrusted(session.peer.key)) return;
      const frame = openPeer(data, session.keys.receive);
      if (!frame || !accept(session.window, header.counter)) return;
      if (session.second) inUse = session;
      session.second = null;
      on.heard();
      on.frame(frame, origin, session.stream);
      on.ready();
    }),
  };

  return {
    ...{ open, current, seal, onFirst, firstHandshake, dropHandshake },
    stream: hex(ownStream),
    wasOpen: () => inUse !== null,
    befriend: () => firsts.befriend(loginOf(peer()!)), // the user knows the peer from now on
    canPunch: () => current() !== null || !!opening?.handshake,
    /** A punch. Until the peer has answered the handshake it is a copy of the first message. */
    punch(probe: number): Uint8Array | null {
      const session = current();
      return session ? seal({ type: "P2PTRASH", probe }, session) : firstHandshake(probe);
    },
    hurry: () => current() ? undefined : sendOpening(), // sends the first message again at once, without a session
    close(): void {
      dropHandshake();
      for (const { index } of sessions) byIndex.delete(index);
    },
    wake(): void {
      if (!opening || io.now < opening.dueAt) return;
      if (on.isNeeded(opening.tries)) return sendOpening();
      dropHandshake();
      opening = null;
    },
    wakeAt: () => opening?.dueAt ?? Infinity,
  };
}

// ---------------------------------------------------------------------------------------------------- delivery
//
//     parts    0  1  2  3  4  5  6  7  ...        a message is cut into parts of 800 bytes, numbered for good
//              |acked |  in flight  | waiting     P2PMESSAGEACK: all before `next`, and 2 bits for each part around it
//
// Each message once, whole and in the order sent, whatever is lost, doubled or overtaken on the way, and whichever way
// it takes. Knows no keys, no paths and no server: `carry` sends a frame and says by which way.

/** Longest chat message in bytes of UTF-8. */
export const MAX_MESSAGE_BYTES = 65_536;
const GIVE_UP_MS = 15_000; // nothing acknowledged for so long: Send Failure!
/** A tail is not sent again sooner than two runtimes' clocks can tell (a tail loss probe, RFC 8985, section 7.2). */
const TAIL_MIN_MS = 20;
const MAX_COPIES = 4; // what all else waits for is sent again in as many copies as it has been tried, up to this
/** Sent so much before a part that has been acknowledged: lost (a fraction of SRTT, as in RACK, RFC 8985). */
const REORDERING = 0.25;
/** Parts on their way at a time: at first, at least, at most. Twice the most fits into one acknowledgement. */
const WINDOW_FIRST = 16, WINDOW_MIN = 4, WINDOW_MAX = 64;
/** What two bits of an acknowledgement say of a part: it is missing, or how its first copy has arrived. */
const ARRIVALS: (PathKind | null)[] = [null, "relay", "direct", "lan"];

interface Part { // A piece of a message, which fits into a datagram.
  seq: number;
  left: number; // so many more follow
  bytes: Uint8Array;
  message: { id: string; startedAt: number };
  tries: number;
  sentAt: number;
  dueAt: number; // when to send it again; Infinity: not sent yet, arrived, or in a handshake, which sees to it
  over: Way | null; // which way it went last
  arrival: PathKind | null; // the peer has it; how its first copy came
}
const UNSENT = { tries: 0, sentAt: 0, dueAt: Infinity, over: null, arrival: null };

const newIncoming = (stream: string) => ({
  stream, // of the peer's program, "" before we know it: a new run numbers its parts from 0 again
  next: 0, // all before this has been delivered or given up
  parts: new Map<number, { left: number; part: Uint8Array }>(),
  arrivals: new Map<number, PathKind>(), // how the first copy of each recent part came
  message: [] as Uint8Array[], // the parts so far of the message that comes next
});

type MessageFrame = Peer & { type: "P2PMESSAGE" };
type AckFrame = Peer & { type: "P2PMESSAGEACK" };

/** The last part has none behind it whose acknowledgement would tell of its loss: it is sent again sooner, once. */
const tailTimeout = ({ srtt, rttvar }: Estimator) =>
  srtt === null ? RTO_FIRST_MS : Math.min(RTO_MAX_MS, Math.max(TAIL_MIN_MS, 2 * srtt, srtt + 4 * rttvar));

/** Two bits for each part from `from`. */
function packArrivals(arrivals: Map<number, PathKind>, from: number): Uint8Array {
  const states = new Uint8Array(WINDOW_MAX / 2);
  for (const [seq, kind] of arrivals) {
    const i = seq - from;
    if (i >= 0 && i < 2 * WINDOW_MAX) states[i >> 2]! |= ARRIVALS.indexOf(kind) << 2 * (i & 3);
  }
  return states;
}

const arrivalOf = ({ states, from }: AckFrame, { seq }: Part): PathKind | null =>
  seq < from ? null : ARRIVALS[(states[(seq - from) >> 2] ?? 0) >> 2 * ((seq - from) & 3) & 3]!;

const isInFlight = ({ tries, arrival }: Part) => tries > 0 && arrival === null;

/** @ignore Exported for its own test. */
export function createDelivery(
  io: Pick<Io, "now" | "emit">,
  { name, relay, way, hasSession }: Pick<Context, "name" | "relay" | "way" | "hasSession">,
  stream: string, // names our messages
  on: {
    carry(frame: Peer, isLate: boolean): Way | null; // by the way in use; late: by both; null: there is no session
    needSession(): void;
    talk(): void; // a message goes either way
    progress(): void;
  },
) {
  let nextSeq = 0, parts: Part[] = [], window = WINDOW_FIRST;
  let progressAt = io.now; // when something was acknowledged last
  let incoming = newIncoming("");
  let ackDue = false; // to be acknowledged as soon as there is a session

  const oldest = () => parts.find(({ arrival }) => arrival === null); // the part that all others wait for
  function frameOf({ seq, left, bytes: part }: Part): MessageFrame {
    return { type: "P2PMESSAGE", seq, base: parts[0]!.seq, left, part };
  }

  // -- outwards

  function pump(): void { // sends what may be sent now: what is due again, and what is new as far as the window allows
    if (parts.length === 0) return;
    on.needSession();
    if (!hasSession()) return;
    const base = oldest()?.seq ?? 0;
    let inFlight = parts.filter(isInFlight).length, isLate = false;
    for (const part of parts) {
      if (part.tries === 0) {
        if (inFlight >= window || part.seq >= base + WINDOW_MAX) break;
        inFlight++;
        send(part);
      } else if (io.now >= part.dueAt) {
        isLate = true;
        send(part);
      }
    }
    if (isLate) window = Math.max(WINDOW_MIN, window / 2);
  }

  function send(part: Part): void {
    // The one that all others wait for: where so much is lost, copies are what gets it through.
    const copies = part === oldest() ? Math.min(MAX_COPIES, Math.max(1, part.tries)) : 1;
    let over: Way | null = null;
    for (let copy = 0; copy < copies; copy++) over = on.carry(frameOf(part), part.tries > 0);
    if (!over) return;
    const isTail = part.tries === 0 && part === parts.at(-1);
    mark(part, over, isTail ? tailTimeout(over.rtt) : timeout(over.rtt, Math.max(1, part.tries)));
  }

  function mark(part: Part, over: Way, waitMs: number): void {
    part.tries++;
    part.sentAt = io.now;
    part.over = over;
    part.dueAt = io.now + waitMs;
  }

  /** The peer does not have any more what it has acknowledged: that is sent again. */
  function unacknowledge(those: Part[], dueAt = io.now): void {
    for (const part of those) if (part.arrival) Object.assign(part, { arrival: null, dueAt });
  }

  function failFirst(reason: Reason): void {
    const [{ message }] = parts as [Part], { id, startedAt } = message, path = way().kind;
    parts = parts.filter((part) => part.message !== message);
    if (parts[0]?.arrival) progressAt = io.now;
    unacknowledge(parts.slice(0, 1));
    io.emit({ event: "sent", to: name, id, ok: false, ms: tenths(io.now - startedAt), path, reason });
  }

  const giveUpAt = () => parts[0] ? Math.max(parts[0].message.startedAt, progressAt) + GIVE_UP_MS : Infinity;

  // -- inwards

  function deliver(): void {
    const { stream, parts, arrivals } = incoming;
    for (let found; (found = parts.get(incoming.next)); incoming.next++) {
      parts.delete(incoming.next);
      incoming.message.push(found.part);
      // All parts but the last are full, see `onPart`.
      const isTooLong = (incoming.message.length - 1) * MAX_PART_BYTES + found.part.length > MAX_MESSAGE_BYTES;
      if (found.left > 0 && !isTooLong) continue;
      if (!isTooLong) {
        const text = fromUtf8.decode(concat(...incoming.message)), path = arrivals.get(incoming.next)!;
        io.emit({ event: "message", from: name, text, path, id: `${stream.slice(0, 8)}-${incoming.next}` });
      }
      incoming.message = [];
    }
    for (const seq of arrivals.keys()) if (seq < incoming.next - WINDOW_MAX) arrivals.delete(seq);
  }

  /** `back` is the way back to where a part came from; false: there is no session yet. */
  function acknowledge(back: (ack: AckFrame) => boolean): void {
    const { next, arrivals } = incoming, from = Math.max(0, next - WINDOW_MAX);
    ackDue = !back({ type: "P2PMESSAGEACK", next, from, states: packArrivals(arrivals, from) });
    if (ackDue) on.needSession();
  }

  return {
    // outwards
    push(text: Uint8Array): void {
      const last = nextSeq + Math.ceil(text.length / MAX_PART_BYTES) - 1;
      const message = { id: `${stream.slice(0, 8)}-${last}`, startedAt: io.now };
      for (let at = 0; nextSeq <= last; nextSeq++, at += MAX_PART_BYTES) {
        const bytes = text.subarray(at, at + MAX_PART_BYTES);
        parts.push({ seq: nextSeq, left: last - nextSeq, bytes, message, ...UNSENT });
      }
      on.talk();
      pump();
    },
    onAck(ack: AckFrame, via: Way): void {
      const news = parts.filter((part) => isInFlight(part) && (part.seq < ack.next || arrivalOf(ack, part)));
      if (news.length > 0) {
        progressAt = io.now;
        window = Math.min(WINDOW_MAX, window + news.length / 4);
        on.progress();
      }
      const newest = Math.max(...news.map(({ sentAt }) => sentAt)) - REORDERING * (via.rtt.srtt ?? RTO_FIRST_MS);
      for (const part of news) {
        if (part.tries === 1 && part.over === via) sample(via.rtt, io.now - part.sentAt); // Karn's algorithm
        part.arrival = arrivalOf(ack, part) ?? part.over!.kind;
        part.dueAt = Infinity;
      }
      for (const part of parts) if (isInFlight(part) && part.sentAt < newest) part.dueAt = io.now;
      // What the peer has not shown to its user is kept, even if it has arrived: the parts of a message that is not
      // whole, and what is behind a gap. A new run of the peer needs it, and so does the peer itself if the gap is
      // given up.
      for (let last; (last = parts.find(({ left }) => left === 0)) && last.arrival && last.seq < ack.next;) {
        parts.splice(0, parts.indexOf(last) + 1);
        const { id, startedAt } = last.message;
        io.emit({ event: "sent", to: name, id, ok: true, ms: tenths(io.now - startedAt), path: last.arrival });
      }
      // The part that the peer waits for has arrived, and yet is not counted: what came before was given up, or the
      // peer has forgotten it, and then all that it does not name any more.
      const awaited = parts.find(({ seq }) => seq >= ack.next);
      if (!awaited?.arrival) return;
      const gone = parts.filter((part) => part === awaited || (part.seq > ack.next && !arrivalOf(ack, part)));
      unacknowledge(gone, io.now + timeout(way().rtt, 1));
    },
    resend(sentBefore: number): void { // what was sent before that time and has not been acknowledged
      for (const part of parts) if (part.sentAt < sentBefore && part.dueAt < Infinity) part.dueAt = io.now;
      pump();
    },
    resendInFlight(): void {
      for (const part of parts.filter(isInFlight)) send(part);
    },
    isIdle: () => parts.length === 0,
    hasSent: () => nextSeq > 0,
    triesOfOldest: () => oldest()?.tries ?? 0,
    // A handshake takes the oldest part along, and sees to it until it is over.
    oldestPart: () => oldest() ? frameOf(oldest()!) : null,
    onHandshake(): void {
      const part = oldest();
      if (part) mark(part, relay, Infinity);
    },
    onHandshakeOver(dueAt: number): void {
      for (const part of parts.filter(isInFlight)) if (part.dueAt === Infinity) part.dueAt = dueAt;
    },
    // inwards
    openStream(stream: string): void {
      if (incoming.stream !== stream) incoming = newIncoming(stream);
    },
    onPart(
      { seq, base, left, part }: MessageFrame,
      { kind, stream, back }: { kind: PathKind; stream: string; back: (ack: AckFrame) => boolean },
    ): void {
      const { parts, arrivals } = incoming;
      if (incoming.stream !== stream || base > seq || part.length > MAX_PART_BYTES) return;
      if (left > 0 && part.length < MAX_PART_BYTES) return; // only the last part of a message may be short
      if (incoming.next < base) { // what came before was given up, or was for a run before ours
        incoming.next = base;
        incoming.message = [];
        for (const seq of parts.keys()) if (seq < base) parts.delete(seq);
      }
      if (seq >= incoming.next + 2 * WINDOW_MAX) return;
      if (seq >= incoming.next && !parts.has(seq)) {
        parts.set(seq, { left, part });
        arrivals.set(seq, kind);
        on.talk();
      }
      deliver();
      acknowledge(back);
    },
    acknowledge,
    isAckDue: () => ackDue,
    owesAck: () => void (ackDue = true), // the peer is to hear from us in the new session
    hasHeard: () => incoming.stream !== "",
    // time
    wake: pump,
    wakeAt: () => hasSession() ? parts.reduce((at, { dueAt }) => Math.min(at, dueAt), giveUpAt()) : giveUpAt(),
    onJump: () => void (progressAt = io.now), // the clock has jumped: the time that it left out does not count
    giveUp(reason: () => Reason): void {
      while (io.now >= giveUpAt()) failFirst(reason());
    },
    failAll(reason: Reason): void {
      while (parts.length > 0) failFirst(reason);
    },
  };
}

// ---------------------------------------------------------------------------------------------------- ping
//
// Round trips that the user asked for: a punch by the way in use, once or several times, and how long its echo took.

const PING_INTERVAL_MS = 500, PING_LOST_MS = 2_000;

function createPing(
  io: Io,
  { name, way, hasSession }: Context,
  on: Record<"needSession" | "talk" | "timeout", () => void> & {
    newProbe(way: Way): number;
    send(probe: number, way: Way): void;
  },
) {
  let left = 0, lost = 0, since = 0, nextAt = 0, waiting: number | null = null; // the probe that has no echo yet

  function tell({ kind: path }: Way, rttMs: number | null): void { // null: it is lost
    if (rttMs === null) lost++;
    io.emit({ event: "ping", peer: name, path, rttMs: rttMs === null ? null : tenths(rttMs), lost });
    left--;
    waiting = null;
    nextAt = rttMs === null ? io.now : io.now + PING_INTERVAL_MS;
  }

  function wake(): void {
    if (left === 0 || io.now < nextAt) return;
    if (!hasSession()) {
      if (io.now - since > GIVE_UP_MS) return on.timeout();
      nextAt = io.now + RTO_MIN_MS;
      return on.needSession();
    }
    if (waiting !== null) tell(way(), null);
    if (left === 0) return;
    nextAt = io.now + PING_LOST_MS;
    waiting = on.newProbe(way());
    on.send(waiting, way());
  }

  return {
    isOn: () => left > 0,
    begin(count: number): void {
      left = count;
      lost = 0;
      waiting = null;
      since = nextAt = io.now;
      on.talk();
      wake();
    },
    onEcho(probe: number, way: Way, rttMs: number): void {
      if (left > 0 && probe === waiting) tell(way, rttMs);
    },
    fail(reason: Reason): void {
      if (left > 0) io.emit({ event: "error", code: reason, message: `"${name}" is not there` });
      left = 0;
    },
    wake,
    wakeAt: () => left > 0 ? nextAt : Infinity,
  };
}

// ---------------------------------------------------------------------------------------------------- list
//
// The list of users comes in pages of one datagram each, several to a question; questions wait for each other.

const LIST_RETRY_MS = 500, LIST_TRIES = 8;
const MAX_LISTED = 1_000_000;

function createList(io: Io, link: Link) {
  const listings: { prefix: string; users: User[]; done(users: User[]): void }[] = [];
  /** Of the first listing: its latest question to the server, and the pages that have come in answer. */
  let asked = 0, tries = 0, dueAt = 0;
  const pages = new Map<number, User[]>();

  const lastName = (users: User[]) => users.at(-1)?.name ?? "";

  function wake(): void {
    const [listing] = listings;
    if (!listing || !link.session() || io.now < dueAt) return;
    if (tries++ >= LIST_TRIES) {
      listings.shift();
      io.emit({ event: "error", code: "unreachable", message: "The server does not answer with the list of users" });
      return askNext();
    }
    pages.clear();
    asked = link.toServer({ type: "GETALLUSER", prefix: listing.prefix, after: lastName(listing.users) });
    dueAt = io.now + LIST_RETRY_MS;
  }

  function askNext(): void {
    tries = 0;
    dueAt = io.now;
    wake();
  }

  return {
    ask(prefix: string, done: (users: User[]) => void): void {
      if (listings.push({ prefix, users: [], done }) === 1) askNext();
    },
    askAgain: () => void (dueAt = io.now), // we are in again: what was asked before is lost
    onUsers(message: Control & { type: "USERS" }): void {
      const [listing] = listings;
      if (!listing || message.asked !== asked) return;
      pages.set(message.page, message.users);
      // Pages without a gap before them count, even if a later one was lost.
      for (let page = 0; pages.has(page); page++) {
        const after = lastName(listing.users);
        listing.users.push(...pages.get(page)!.filter(({ name }) => name > after));
        if (page < message.last) continue;
        if (!message.more || listing.users.length >= MAX_LISTED) listings.shift()!.done(listing.users);
        return askNext();
      }
    },
    wake,
    wakeAt: () => listings.length > 0 && link.session() ? dueAt : Infinity,
  };
}

// ---------------------------------------------------------------------------------------------------- sockets
//
// Sockets beyond the first one: each has a mapping of its own in our NAT.

const MAX_SOCKETS = 600; // at a time: two sprays, and what else is going on

function createSockets(effect: (effect: Effect<ClientEvent>) => void) {
  const open = new Set<number>(), opening = new Map<number, (port: number) => void>();
  let last = 0;
  return {
    open(then: (socket: number, port: number) => void): void {
      const socket = ++last;
      open.add(socket);
      opening.set(socket, (port) => {
        if (port === 0) open.delete(socket);
        then(socket, port);
      });
      effect({ kind: "open", socket });
    },
    close(socket: number): void {
      if (open.delete(socket)) effect({ kind: "close", socket });
    },
    opened(socket: number, port: number): void {
      const then = opening.get(socket);
      opening.delete(socket);
      then?.(port);
    },
    hasFree: (count: number) => open.size + count <= MAX_SOCKETS,
  };
}

// ---------------------------------------------------------------------------------------------------- people
//
// Whom we know from the list of users, whose key the user has seen, and whom he does not want to hear.

const MAX_KNOWN_USERS = 20_000, MAX_BLOCKED = 1_000;

function createPeople() {
  const known = new Map<string, User>(), verified = new Map<string, Uint8Array>();
  const blocked = new Map<string, Uint8Array | undefined>(); // names, and their keys if we know them
  return {
    known: (name: string) => known.get(name),
    learn(user: User): void {
      known.delete(user.name);
      if (known.size >= MAX_KNOWN_USERS) known.delete(known.keys().next().value!);
      known.set(user.name, user);
    },
    verify: (name: string, key: Uint8Array) => void verified.set(name, key),
    isVerified: (name: string) => verified.has(name),
    /** No other key than the one that was verified counts for that name. */
    isTrusted: (name: string, key: Uint8Array) => !verified.has(name) || sameKey(verified.get(name)!, key),
    block(name: string, key = known.get(name)?.key): void {
      if (blocked.size >= MAX_BLOCKED) blocked.delete(blocked.keys().next().value!);
      blocked.set(name, key);
    },
    unblock: (name: string) => void blocked.delete(name),
    /** Under his name, or under another one that his key has now. */
    isBlocked(name: string, key?: Uint8Array): boolean {
      if (blocked.has(name) && key) blocked.set(name, blocked.get(name) ?? key.slice());
      return blocked.has(name) || (!!key && [...blocked.values()].some((other) => other && sameKey(other, key)));
    },
    blocked: () => [...blocked.keys()],
  };
}

// ---------------------------------------------------------------------------------------------------- faults
//
// Bugs of this program that show: each is told once, and the rest goes on.

const MAX_FAULTS = 20;

function createFaults(emit: Io["emit"]) {
  const told = new Set<string>();
  let count = 0;
  function tell(error: unknown, where = ""): void {
    count++;
    const stack = String((error as Error | undefined)?.stack ?? error);
    if (told.has(stack) || told.size >= MAX_FAULTS) return;
    told.add(stack);
    const message = `A bug of this program${where}, please report it: ${stack}`;
    emit({ event: "error", code: "bug", message, notice: true });
  }
  return { tell, guard: guardWith(tell), count: () => count };
}

// ---------------------------------------------------------------------------------------------------- commands

type List = ReturnType<typeof createList>;
type People = ReturnType<typeof createPeople>;
type Carrier = { [C in Command["command"]]: (command: Extract<Command, { command: C }>) => void };

/** What the user asks for. */
function createCommands(
  io: Io,
  { name, keys }: ClientOptions,
  { link, discovery, list, people }: { link: Link; discovery: Discovery; list: List; people: People },
  all: Map<string, Conversation>,
  on: {
    conversationTo(typed: string): Conversation | null;
    verified(peer: string, key: Uint8Array): void;
    block(peer: string): void;
    exit(): void;
  },
): Carrier {
  const error = (code: string, message: string) => io.emit({ event: "error", code, message });
  const nobody = (peer: string) => error("unknown", `There is no "${peer}" here`);

  function reportNat(): void {
    const session = link.session(), hairpin = discovery.hairpin();
    io.emit({ event: "nat", ...discovery.nat(), public: session?.public ?? "", hairpin, udp: session !== null });
  }

  return {
    send({ to, text }) {
      const bytes = utf8.encode(text), isTooLong = bytes.length > MAX_MESSAGE_BYTES;
      const isBlocked = people.isBlocked(userName(to) ?? "");
      const c = isBlocked ? null : io.guard(on.conversationTo)(to);
      if (c && bytes.length > 0 && !isTooLong && !c.isUntrusted()) return c.send(bytes);
      const toNobody = isBlocked ? "blocked" : c ? "untrusted" : c === null ? "unknown" : "timeout";
      const reason = bytes.length === 0 ? "empty" : isTooLong ? "too-long" : toNobody;
      io.emit({ event: "sent", to, id: `${hex(io.random(4))}-0`, ok: false, ms: 0, path: "relay", reason });
    },
    getu({ prefix }) {
      if (utf8.encode(prefix).length > MAX_NAME_BYTES) return io.emit({ event: "users", users: [] });
      list.ask(prefix, (users) => {
        io.emit({ event: "users", users: users.map(({ name, public: endpoint }) => ({ name, public: endpoint })) });
      });
    },
    path({ peer }) {
      const found = [...all.values()].filter((c) => !peer || c.name === userName(peer));
      for (const c of found) c.tellPath();
      if (peer && found.length === 0) error("unknown", `No conversation with "${peer}" yet: send something first`);
    },
    ping({ peer, count }) {
      if (people.isBlocked(userName(peer) ?? "")) {
        return error("blocked", `"${peer}" is blocked: first unblock ${peer}`);
      }
      const c = on.conversationTo(peer);
      if (c) c.startPing(count);
      else nobody(peer);
    },
    block({ peer }) {
      if (peer && (userName(peer) === null || userName(peer) === name)) return nobody(peer);
      if (peer) on.block(userName(peer)!);
      io.emit({ event: "blocked", peers: people.blocked() });
    },
    unblock({ peer }) {
      if (!people.blocked().includes(userName(peer) ?? "")) return error("unknown", `"${peer}" is not blocked`);
      people.unblock(userName(peer)!);
      io.emit({ event: "blocked", peers: people.blocked() });
    },
    verify({ peer: typed }) {
      const peer = userName(typed);
      if (peer === null) return nobody(typed);
      list.ask(peer, (users) => {
        const key = all.get(peer)?.peer()?.key ?? users.find(({ name }) => name === peer)?.key; // the one in use
        if (!key) return nobody(peer);
        on.verified(peer, key);
        io.emit({ event: "verify", peer, code: safetyCode(keys.public, key) });
      });
    },
    nat: () => discovery.whenDone(reportNat),
    exit() {
      if (link.session()) link.toServer({ type: "LOGOUT" });
      io.emit({ event: "logout", name, reason: "exit" });
      on.exit();
    },
  };
}

// ---------------------------------------------------------------------------------------------------- client
//
// Puts the rooms together: tells each datagram's conversation, and each room what others have found out.

const MAX_CONVERSATIONS = 1_000;
/** What all conversations together may do. */
const HOST_LIMITS = {
  // Where nothing has come back from yet, as a server can name any place as a peer's: 30 a second. Who merely calls us
  // cannot use up what those need to whom the user has written.
  punch: { perSecond: 20, burst: 100 },
  strangersPunch: { perSecond: 10, burst: 50 },
  probe: { perSecond: 300, burst: 600 }, // sprays and their like, for a peer who has shown that it is in a session
  greet: { perSecond: 50, burst: 200 }, // answers to first messages of people whom the user has never written to
  warn: { perSecond: 0.2, burst: 10 }, // of peers who do not know what they must know
} satisfies Record<string, Rate>;

function hostLimits(): Record<keyof typeof HOST_LIMITS, Limit> {
  const limits = Object.entries(HOST_LIMITS).map(([what, rate]) => [what, createLimit(rate)]);
  return Object.fromEntries(limits) as Record<keyof typeof HOST_LIMITS, Limit>;
}
const REST_MS = 100; // after a bug that showed when something was due, which would only show again

/** Those that only the other side has spoken in go first; of them those without a path, and the longest silent. */
function leastDear(all: Iterable<Conversation>): Conversation | undefined {
  const order = (a: number[], b: number[]) => a.map((n, i) => n - b[i]!).find((difference) => difference) ?? 0;
  const idle = [...all].flatMap((c) => c.rank() ? [{ c, rank: c.rank()! }] : []);
  return idle.sort((a, b) => order(a.rank, b.rank))[0]?.c;
}

/** Makes a client; it logs in as soon as its socket 0 is open. */
export function createClient(options: ClientOptions): Client {
  const { name, servers, random } = options, conversations = new Map<string, Conversation>();
  let addresses: string[] = [], port = 0;
  let isClosed = false; // logged out, refused, or no server found: nothing happens any more
  const close = () => void (isClosed = true);
  let effects: Effect<ClientEvent>[] = []; // what the event that is being handled has led to so far

  const sockets = createSockets((effect) => effects.push(effect));
  const emit = (event: ClientEvent) => void effects.push({ kind: "event", event }), faults = createFaults(emit);
  const io = {
    now: 0,
    random,
    emit,
    send: (socket: number, to: Endpoint, data: Uint8Array, ttl?: number) =>
      void effects.push({ kind: "send", socket, to, data, ...ttl === undefined ? {} : { ttl } }),
    open: sockets.open,
    close: sockets.close,
    guard: faults.guard,
  };
  const limits = hostLimits(), people = createPeople();
  const may: Shared["may"] = (what) => limits[what](io.now);

  /** Ends a conversation, whatever state it is in. */
  function endConversation(c: Conversation, reason: Reason): void {
    for (const [peer, other] of conversations) if (other === c) conversations.delete(peer);
    c.failAll(reason);
    c.close();
  }

  const warm = () => [...conversations.values()].filter((c) => c.isWarm());
  const pace = () => warm().some((c) => !c.best()) ? "relay" : warm().length > 0 ? "warm" : "idle";
  const lan = () => addresses.filter((address) => scopeOf(address) === "private").slice(0, MAX_CANDIDATES);
  const local = () => lan().map((address) => formatEndpoint(address, port));

  function learn(users: User[]): void {
    for (const user of users) {
      people.learn(user);
      conversations.get(user.name)?.onUser(user);
    }
  }

  // -- the rooms, and what one finds out and another must do

  const link = createLink(io, options, { local, pace, nat: () => discovery.nat() }, {
    users: learn,
    message: onMessage,
    endpoint: () => discovery.start(link.session()!),
    session(isAgain) {
      for (const c of conversations.values()) c.onLogin(isAgain);
      if (isAgain) list.askAgain();
    },
    moved: () => warm().forEach((c) => c.onMoved()),
    confirmed() { // the server knows our class of NAT, and tells it to those whom it introduces us to
      if (discovery.confirm()) { for (const c of warm()) if (!c.best()) c.call(); }
    },
    refused: close,
  });
  const isOwn = (host: string) => addresses.includes(host) || scopeOf(host) === "loopback";
  const discovery = createDiscovery(io, {
    isOwn,
    mayAsk: (whom) =>
      [...servers, options.observer].includes(whom) || hostOf(whom) === hostOf(link.session()!.server) ||
      may("punch"),
    changed: link.report,
  }, options.observer);
  const list = createList(io, link);
  const commands = createCommands(io, options, { link, discovery, list, people }, conversations, {
    conversationTo: (typed) => userName(typed) === null ? null : conversationWith(userName(typed)!),
    verified(peer, key) {
      people.verify(peer, key);
      conversations.get(peer)?.onVerified();
    },
    block(peer) {
      people.block(peer, conversations.get(peer)?.peer()?.key);
      for (const [name, c] of conversations) {
        if (people.isBlocked(name, c.peer()?.key)) endConversation(c, "blocked");
      }
    },
    exit: close,
  });
  const shared: Shared = {
    options,
    link,
    discovery,
    switchboard: createSwitchboard(),
    user: people.known,
    isVerified: people.isVerified,
    isTrusted: people.isTrusted,
    may,
    hasSockets: sockets.hasFree,
    broken(c, error) {
      if (![...conversations.values()].includes(c)) return; // it has ended already
      endConversation(c, "timeout");
      faults.tell(error, ` has ended the conversation with "${c.name}"`);
    },
    sprayTurn: { takenAt: -Infinity },
  };
  const { byIndex, byEphemeral } = shared.switchboard;

  // -- whom a datagram is for

  /** What we send to ourselves comes back to somebody who is not us: the conversation with no name. */
  const nameOf = (peer: string) => peer === name ? "" : peer;

  function conversationWith(peer: string): Conversation | null {
    if (!conversations.has(peer) && conversations.size >= MAX_CONVERSATIONS) {
      const least = leastDear(conversations.values());
      if (!least) return null;
      endConversation(least, "offline"); // nothing of ours waits in it
    }
    const c = conversations.get(peer) ?? createConversation(io, peer || name, shared);
    conversations.set(peer, c);
    return c;
  }

  function onMessage(message: Control): void {
    if (message.type === "USERS") {
      learn(message.users);
      list.onUsers(message);
    } else if (message.type === "INTRODUCTION") conversations.get(message.peer.name)?.onIntroduction(message.peer);
    else if (message.type === "P2PSOMEONEWANTTOCALLYOU") {
      if (people.isBlocked(message.peer.name, message.peer.key)) return;
      const c = conversationWith(nameOf(message.peer.name));
      c?.onCall(message.peer, message.body.length > 0 ? () => onPeerDatagram(message.body, null, c) : null);
    } else if (message.type === "RELAYED") {
      const c = conversations.get(nameOf(message.from));
      if (c && c.peer()?.nonce === message.nonce) onPeerDatagram(message.body, null, c);
    } else if (message.type === "PUNCHED") conversations.get(message.peer)?.onPunched();
    else if (message.type === "ERROR" && (message.reason === "unknown" || message.reason === "offline")) {
      conversations.get(message.about)?.onError(message.reason);
    }
  }

  /** `caller` is who the server says it is, if it came over the relay. */
  function onPeerDatagram(data: Uint8Array, origin: Origin, caller?: Conversation): void {
    const handshake = decodeHandshake(data);
    if (!handshake) byIndex.get(peerHeader(data)?.index ?? -1)?.onSealed(data, origin);
    else if (handshake.type === "P2PSECOND") byIndex.get(handshake.to)?.onSecond(handshake, origin);
    else {
      const onCopy = byEphemeral.get(ephemeralOf(handshake));
      if (onCopy) onCopy(handshake.probe, origin);
      else caller?.onFirst(handshake);
    }
  }

  /** Whether nobody whom we know can have sent that: then it costs no more than this look, however many we know. */
  function isNobodys({ data, from }: Datagram): boolean {
    if (data[0]! < 4) return !discovery.isAsking();
    if (controlHeader(data)) return !servers.includes(from);
    const handshake = decodeHandshake(data);
    if (!handshake) return !byIndex.has(peerHeader(data)?.index ?? -1);
    return handshake.type === "P2PSECOND" ? !byIndex.has(handshake.to) : !byEphemeral.has(ephemeralOf(handshake));
  }

  // -- events in, effects out

  let dueAt: number | null = null; // computed once for each event
  let restsUntil = 0;
  function wakeAt(): number {
    if (dueAt !== null) return dueAt;
    dueAt = Math.min(link.wakeAt(), list.wakeAt(), discovery.wakeAt());
    for (const c of conversations.values()) dueAt = Math.min(dueAt, c.wakeAt());
    return dueAt = isClosed ? Infinity : Math.max(dueAt, restsUntil);
  }

  /** Handles an event that happened `at` some time; `work` says how. */
  function step(at: number, work: () => void): Effect<ClientEvent>[] {
    io.now = at;
    effects = [];
    if (isClosed) return effects;
    if (at - wakeAt() > JUMP_MS) { for (const c of conversations.values()) c.onJump(); }
    dueAt = null;
    io.guard(work)();
    return effects;
  }

  return {
    opened: (socket, openedPort, at) =>
      step(at, () => {
        if (socket !== 0) return sockets.opened(socket, openedPort);
        port = openedPort;
        link.begin();
      }),
    receive: (datagram, at) =>
      isNobodys(datagram) ? [] : step(at, () => {
        if (datagram.data[0]! < 4) return discovery.receive(datagram.data);
        const control = decode(datagram.data);
        if (control) link.receive(control, datagram);
        else onPeerDatagram(datagram.data, { socket: datagram.socket, from: datagram.from });
      }),
    wake: (at) =>
      step(at, () => {
        const before = faults.count();
        for (const room of [link, list, discovery]) io.guard(room.wake)();
        for (const c of conversations.values()) if (at >= c.wakeAt()) c.wake();
        if (faults.count() > before) restsUntil = at + REST_MS;
      }),
    wakeAt,
    command: (command, at) => step(at, () => commands[command.command](command as never)),
    interfaces: (found, at) =>
      step(at, () => {
        if (found.join() === addresses.join()) return;
        addresses = found;
        link.report();
      }),
  };
}

// ---------------------------------------------------------------------------------------------------- command line
//
// The rest is for people and scripts: a line that they type becomes a command of the client, and its events are told in
// words or in JSON. This part knows no more of the client than any other program does: its commands and its events.

const USAGE = `Talks to other users of a Punch server, directly wherever a hole can be punched.

  deno task client [SERVER[:PORT][#FINGERPRINT]] [NAME] [options]
  bun client.ts [SERVER[:PORT][#FINGERPRINT]] [NAME] [options]

  #FINGERPRINT        of the server's key, as the server prints it: no other one will do
  --port N            local UDP port (default any)
  --secret-file F     what you and your colleague alone know (or PUNCH_SECRET); - asks for it
  --weak-secret       take a secret that can be guessed
  --new-secret        print a new secret and end
  --password-file F   the password of the server (or PUNCH_PASSWORD); - asks for it
  --identity F        keep the key in F: the name is held, and colleagues recognise the key
  --stun HOST:PORT    a STUN server elsewhere, to know one's NAT better
  --no-direct         never punch, stay on the relay; nobody is told your address
  --json              one JSON object a line on stdout
  --trace[=FILE]      every datagram on stderr, or in FILE
  -h, --help; --version

Commands, one a line:
  send NAME MESSAGE   send a message
  getu [PREFIX]       list the users, with their public endpoints
  path [NAME]         which way messages take
  ping NAME [COUNT]   measure the round trip
  nat                 what your NAT is like, and what that means
  verify NAME         a code to compare with the other side, aloud
  block [NAME]        hear nothing more of somebody; without NAME: who is blocked
  unblock NAME        hear of somebody again
  sleep SECONDS       wait (in scripts)
  help, exit
`;
const HELP = USAGE.slice(USAGE.indexOf("Commands, one a line"));

/** A line as a command. An error says what is wrong with it; null: there is nothing to do. */
export function parseCommand(line: string): Command | { command: "sleep"; seconds: number } | "help" | Error | null {
  const [verb, peer, times = 3] = line.match(/\S+/g) ?? [], count = Number(times);
  const isCount = Number.isInteger(count) && count > 0 && count <= 1000;
  if (verb === undefined) return null;
  if (verb === "help") return verb;
  if (verb === "nat" || verb === "exit") return { command: verb };
  if (verb === "getu") return { command: verb, prefix: peer ?? "" };
  if (verb === "path") return { command: verb, peer: peer ?? null };
  if (verb === "send" && peer) return { command: verb, to: peer, text: line.replace(/^\s*\S+\s+\S+\s?/, "") };
  if (verb === "ping" && peer && isCount) return { command: verb, peer, count };
  if ((verb === "verify" || verb === "unblock") && peer) return { command: verb, peer };
  if (verb === "block") return { command: verb, peer: peer ?? null };
  if (verb === "sleep" && Number(peer) >= 0) return { command: verb, seconds: Number(peer) };
  const usage = HELP.split("\n").find((row) => row.startsWith(`  ${verb} `))?.slice(2, 22).trimEnd();
  if (usage === undefined) return new UsageError(`Unknown command "${verb}": try help`);
  return new UsageError(`Usage: ${usage}${verb === "ping" ? ", COUNT of 1 to 1000" : ""}`);
}

// ---------------------------------------------------------------------------------------------------- words

/** How each event is told to people. */
const WORDS: { [Name in ClientEvent["event"]]: (event: ClientEvent & { event: Name }) => string } = {
  login: ({ name, server, public: endpoint, users, fingerprint, kept }) =>
    `You are "${name}", seen at ${endpoint}; ${users} here. A colleague joins with:\n` +
    `  deno task client ${server}${kept ? `#${fingerprint}` : ""} <name>` +
    (kept ? "" : `\nThe server's key is ${fingerprint}, until it is started again`),
  users: ({ users }) => {
    const width = Math.max(0, ...users.map(({ name }) => columns(name)));
    const lines = users.map((user) =>
      `\n  ${user.name}${" ".repeat(width - columns(user.name))}  ${user.public || "(not told)"}`
    );
    return `${users.length} user${users.length === 1 ? "" : "s"}:${lines.join("")}`;
  },
  message: (event) => messageInWords(event),
  sent: (sent) =>
    sent.ok
      ? `Send OK! (to ${sent.to}, ${sent.path}, ${sent.ms} ms)`
      : `Send Failure! (to ${sent.to}: ${FAILURES[sent.reason]})`,
  path: ({ peer, path, address, rttMs }) =>
    `The path to ${peer} is ${path === "relay" ? "over the server" : path}, ${address}` +
    (rttMs === null ? "" : `, round trip ${rttMs} ms`),
  ping: ({ peer, path, rttMs, lost }) =>
    rttMs === null ? `No answer from ${peer} (${path}), ${lost} lost` : `${peer} answers in ${rttMs} ms (${path})`,
  blocked: ({ peers }) => peers.length > 0 ? `Blocked: ${peers.join(", ")}` : "Nobody is blocked",
  verify: ({ peer, code }) => `Read this to ${peer}, who must see the same: ${code}`,
  nat: natInWords,
  error: ({ message }) => message,
  reconnecting: ({ reason }) => `Connecting again: ${reason}. Direct conversations go on`,
  reconnected: () => "Connected again",
  logout: () => "Logged out",
};

const inWords = (event: ClientEvent) => (WORDS[event.event] as (event: ClientEvent) => string)(event);
/** These tell how things stand, on stderr; messages and answers go to stdout. */
const ON_STDERR = ["login", "error", "reconnecting", "reconnected", "logout"];
const FAILURES: Record<Reason, string> = {
  unknown: "there is no such user",
  offline: "has left",
  timeout: "no answer in 15 s",
  empty: "an empty message",
  "too-long": `over ${MAX_MESSAGE_BYTES} bytes`,
  blocked: "is blocked: first unblock",
  untrusted: "the key or the secret is another one; see verify and --secret-file",
};

const LINE_END = /\r\n|[\r\n]/, INDENT = "    ";

/**
 * A message as people see it. All its lines but the first are indented, also those that a terminal of so many columns
 * would begin, so that none looks like a message of somebody else.
 */
export function messageInWords(
  { from, text, path }: Pick<MessageEvent, "from" | "text" | "path">,
  width = Infinity,
): string {
  const lines = text.replaceAll("\t", INDENT).split(LINE_END).map(harmless).join(`\n${INDENT}`);
  let all = "", used = 0;
  for (const letter of `${from}: ${lines}  (${path})`) {
    const isFull = used + columns(letter) > width - 1 && width > 2 * INDENT.length;
    all += isFull ? `\n${INDENT}${letter}` : letter;
    used = letter === "\n" ? 0 : columns(letter) + (isFull ? INDENT.length : used);
  }
  return all;
}

/** Columns that a text takes on a terminal: two for East Asian wide characters and emoji, none for marks. */
const columns = (text: string) => [...text.replace(/\p{M}/gu, "").replace(WIDE, "__")].length;
const WIDE =
  /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|\p{Emoji_Presentation}|[\u{20000}-\u{3fffd}]/gu;

const FILTERING: Record<NatClass["filtering"], string> = {
  APDF: "Only those you have written to can write to you, port by port (APDF)",
  ADF: "Whoever you have written to can write to you from any port (ADF)",
  EIF: "Anybody can write to you (EIF)",
  unknown: "A port you have not written to can write to you (EIF or ADF)",
};
const NEXT_PORT: Record<NatClass["allocation"], string> = { // which port of a symmetric NAT the next destination sees
  preserving: "the one inside if it is free",
  sequential: "one after the other",
  block: "any of a block",
  random: "any",
  unknown: "we do not know which",
};

function natInWords(nat: NatEvent): string { // what one's NAT means for reaching others
  const { mapping, allocation, hairpin } = nat;
  if (!nat.udp) return "UDP does not reach the server: it is blocked here, or the server is not running";
  const samePort = "every destination sees the same port";
  let kind = mapping === "EIM"
    ? `${samePort} (EIM)`
    : `as far as one server can tell, ${samePort} (EIM, or ADM: --stun gives a second opinion)`;
  let outlook = "direct to everybody but those behind blocked UDP; to random symmetric NATs within seconds";
  if (isSymmetric(nat)) {
    kind = `symmetric (${mapping}): each destination sees another port, ${NEXT_PORT[allocation]}`;
    outlook = allocation === "random" || allocation === "block"
      ? "direct to everybody whose NAT is not symmetric, within seconds; over the server to the others"
      : "direct to nearly everybody; over the server to symmetric NATs with random ports";
  }
  const lines = [`You are seen at ${nat.public}`, `Your NAT: ${kind}`, FILTERING[nat.filtering]];
  const reach = hairpin ? "reach" : "do not reach";
  if (hairpin !== null) lines.push(`Two behind it ${reach} each other by its public address`);
  return [...lines, `So you are ${outlook}`].join("\n  ");
}

// ---------------------------------------------------------------------------------------------------- addresses, files

/** Interfaces of containers, virtual machines and tunnels: nobody at the other end can come in through them. */
const DEAD_END_INTERFACES = /^(docker|veth|br-|virbr|tun|wg)/;

function localAddresses(): string[] { // IP addresses of this host at which it may be reached.
  const alive: string[] = [], deadEnds: string[] = [];
  try {
    for (const [name, entries = []] of Object.entries(networkInterfaces())) {
      const found = entries.map(({ address }) => address).filter((address) => /private|public/.test(scopeOf(address)));
      (DEAD_END_INTERFACES.test(name) ? deadEnds : alive).push(...found);
    }
  } catch { /* Deno without --allow-sys=networkInterfaces: then without a path over the LAN */ }
  return alive.length > 0 ? alive : deadEnds;
}

/** The server's endpoints, at most one in each IP version. */
async function resolve(server: string, defaultPort: number): Promise<Endpoint[]> {
  const match = /^(?:\[([^\]]+)\]|([^:]*)|(.*:.*:.*))(?::(\d+))?$/.exec(server);
  const host = match?.[1] ?? match?.[2] ?? match?.[3], port = Number(match?.[4] ?? defaultPort);
  if (!host || port < 1 || port > 65535) throw new UsageError(`"${server}" is not a server: SERVER or SERVER:PORT`);
  const found = await lookup(host, { all: true }).catch(() => []);
  const firsts = [4, 6].flatMap((version) => found.find(({ family }) => family === version) ?? []);
  if (firsts.length > 0) return firsts.map(({ address }) => formatEndpoint(address, port));
  throw new Failure(`Cannot find the server "${host}": check the name, or give its IP address`);
}

const STRONG_BITS = 60;

/**
 * How many bits it takes to guess a secret, roughly: 15 for a word (people know some 30,000), 2 for each letter of a
 * longer one, 8 for a Chinese character, 3.3 for a digit, 5 for another sign; nothing for blanks, hyphens and a word
 * that comes again. In all there are no more than 8 for each different character.
 */
export function secretBits(secret: string): number {
  const text = secret.normalize("NFKC").toLowerCase();
  const words = new Set(text.match(/(?:(?!\p{Script=Han})\p{L})+/gu)),
    signs = text.match(/\p{Script=Han}|[^\p{L}\s-]/gu) ?? [];
  let bits = 0;
  for (const { length } of words) bits += Math.min(4.7 * length, Math.max(15, 2 * length));
  for (const sign of signs) bits += /\p{L}/u.test(sign) ? 8 : /\p{N}/u.test(sign) ? 3.3 : 5;
  return Math.min(bits, 8 * new Set(text).size);
}

// ---------------------------------------------------------------------------------------------------- screen and main

function createScreen() { // where lines are typed and events are shown: a terminal with a prompt, or else pipes
  const { stdin, stdout } = process;
  const terminal = stdin.isTTY ? createInterface({ input: stdin, output: stdout, prompt: "> " }) : null;
  const lines = terminal?.[Symbol.asyncIterator]() ?? pipedLines();
  let isOpen = terminal !== null;
  terminal?.on("close", () => isOpen = false); // as by Ctrl-D: from then on a prompt would throw
  const prompt = (keepsCursor = false) => isOpen && terminal?.prompt(keepsCursor);
  const ask = async (what: string): Promise<string> => {
    if (!terminal) throw new UsageError(`The ${what} is missing`);
    stdout.write(`${what}: `);
    const { value, done } = await lines.next();
    if (done) process.exit(1);
    return value.trim() || ask(what);
  };
  const show = (text: string, stream: "stdout" | "stderr") => {
    if (terminal) stdout.write("\x1b[1G\x1b[2K"); // goes to the first column and clears the line of the prompt
    const isDim = terminal && stream === "stderr" && !environment("NO_COLOR");
    process[stream].write((isDim ? `\x1b[2m${text}\x1b[0m` : text) + "\n");
    prompt(true);
  };
  return { terminal, lines, ask, show, prompt };
}
type Screen = ReturnType<typeof createScreen>;

/** Lines of a script. readline would also end them at a lone CR or U+2028, and run what comes after as a command. */
async function* pipedLines(): AsyncGenerator<string, undefined> {
  let rest = "";
  for await (const chunk of process.stdin.setEncoding("utf8")) {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop()!;
    for (const line of lines) yield line.replace(/\r$/, "");
  }
  if (rest !== "") yield rest;
}

/** A handshake with ourselves: the first one of a run takes 10 ms longer, and the first message should not. */
function warmUp(): void {
  const own = generateKeys(), ephemeral = generateKeys(), psk = new Uint8Array(32);
  const options = { own, peer: own.public, psk, prologue: psk, ephemeral };
  const initiation = initiate(options, psk)!, answer = respond(options, initiation.message)!.answer(psk)!;
  const { keys } = initiation.finish(answer.message)!;
  openPeer(sealPeer({ type: "P2PTRASH", probe: 0 }, { index: 0, counter: 0, key: keys.send }), answer.keys.receive);
}

const STUN_PORT = 3478, INTERFACES_CHECK_MS = 5_000;
const GOODBYE_MS = 50; // long enough for the last datagrams to leave

async function main(): Promise<void> {
  const { options, others } = readArguments({
    flags: ["weak-secret", "new-secret", "no-direct", "json", "help", "version"],
    values: ["port", "secret-file", "password-file", "identity", "stun"],
    optional: ["trace"],
  });
  if (options.help) return void process.stdout.write(USAGE);
  if (options.version) return console.log(`Punch, version ${VERSION} of its protocol`);
  if (options["new-secret"]) return console.log(newSecret());
  const port = Number(options.port === undefined ? 0 : options.port || NaN);
  if (!Number.isInteger(port) || port < 0 || port > 65535) throw new UsageError(`"${options.port}" is not a port`);
  if (others.length > 2) throw new UsageError(`Too many arguments: "${others[2]}"`);

  const secretFile = options["secret-file"], passwordFile = options["password-file"];
  tellInvisible([
    ...secretFile === undefined ? ["PUNCH_SECRET"] : [],
    ...passwordFile === undefined ? ["PUNCH_PASSWORD"] : [],
  ]);
  const secret = await secretWords({ file: secretFile, variable: "PUNCH_SECRET", label: "secret" });
  if (secret !== undefined && !options["weak-secret"] && secretBits(secret) < STRONG_BITS) {
    const advice = "take one from --new-secret, or four words that have nothing to do with each other";
    throw new Failure(`The secret can be guessed: ${advice}; --weak-secret takes it all the same`);
  }
  const password = await secretWords({ file: passwordFile, variable: "PUNCH_PASSWORD", label: "password" });
  const keys = options.identity === undefined ? generateKeys() : identityIn(options.identity);
  const screen = createScreen(), trace = openTrace(options.trace, console.error);
  const { fingerprint, servers } = await serverFrom(others[0] ?? await screen.ask("server"));
  const wanted = others[1] ?? await screen.ask("name"), name = userName(wanted);
  if (name === null) throw new UsageError(`"${wanted}" is not a name: ${nameFault(wanted)}`);
  const client = createClient({
    ...{ name, servers, fingerprint, keys },
    keepName: options.identity !== undefined,
    psk: secret === undefined ? undefined : keyFromWords(secret, "secret"),
    password: password === undefined ? undefined : (serverKey) => keyFromWords(password, "password", serverKey),
    observer: options.stun === undefined
      ? undefined
      : (await resolve(options.stun, STUN_PORT)).find((to) => !isIPv6(to)),
    direct: !options["no-direct"],
    patient: screen.terminal !== null,
    random: (length) => Uint8Array.from(randomBytes(length)),
    generateKeys,
  });
  warmUp();
  await converse(client, screen, { port, json: options.json ?? false, trace });
}

/** SERVER[:PORT][#FINGERPRINT] */
async function serverFrom(typed: string): Promise<{ servers: Endpoint[]; fingerprint: string | undefined }> {
  const [server = "", ...after] = typed.split("#"),
    fingerprint = after.length === 0 ? undefined : parseFingerprint(after.join("#"));
  if (fingerprint === null) {
    throw new UsageError(
      `"#${after.join("#")}" is not a fingerprint: 20 letters and digits, as the server prints them`,
    );
  }
  return { servers: await resolve(server, DEFAULT_PORT), fingerprint };
}

/** Carries out line after line. On a terminal the next one need not wait for what comes of the one before. */
/** The event that answers a command, where its name is another one. */
const ANSWERS: Partial<Record<Command["command"], ClientEvent["event"]>> = {
  send: "sent",
  getu: "users",
  block: "blocked",
  unblock: "blocked",
};

async function converse(
  client: Client,
  screen: Screen,
  args: { port: number; json: boolean; trace: Trace | undefined },
) {
  const { terminal, lines, show, prompt } = screen, { trace } = args;
  let isListDue = false, hasFailed = false, isOver = false;
  let onEvent: (event: ClientEvent) => void = () => {};
  const until = (fits: (event: ClientEvent) => boolean) =>
    new Promise<void>((resolve) => onEvent = (event) => fits(event) && resolve());

  function say(event: ClientEvent): void {
    if (args.json) console.log(jsonLine(event));
    else if (event.event === "message") {
      show(messageInWords(event, terminal ? process.stdout.columns : undefined), "stdout");
    } else show(inWords(event), ON_STDERR.includes(event.event) ? "stderr" : "stdout");
    const isError = event.event === "error";
    const isList = isListDue && (event.event === "users" || (isError && event.code === "unreachable"));
    isListDue = event.event === "login" || (isListDue && !isList);
    if (isList) return; // the list at login is nobody's answer
    onEvent(event);
    // What others do, such as calling with another secret, is no failure of ours.
    hasFailed ||= (isError && !event.notice) || (event.event === "sent" && !event.ok);
    if (isError && event.fatal) end(1);
  }
  function end(code: number): void {
    if (isOver) return;
    isOver = true;
    terminal?.close();
    perform({ command: "exit" });
    setTimeout(() => process.exit(code), GOODBYE_MS);
  }
  function carryOut(command: Command): Promise<void> {
    const verb = command.command, answer = ANSWERS[verb] ?? verb;
    let left = command.command === "ping" ? command.count : 1;
    const outcome = until((event) => {
      if (event.event === answer) left--;
      return left <= 0 || (event.event === "error" && (!event.notice || event.code === "bug") && verb !== "send");
    });
    perform(command);
    return verb === "path" ? Promise.resolve() : outcome; // the paths are told at once, if there are any
  }

  client.interfaces(localAddresses(), clock());
  const sockets = (host: string) => ({ sockets: [{ host, port: args.port }], onEvent: say, onDatagram: trace });
  const running = await listenOrFail((host) => listen(client, sockets(host)), { json: args.json });
  const perform = (command: Command) => running.perform(client.command(command, clock()));
  setInterval(() => running.perform(client.interfaces(localAddresses(), clock())), INTERFACES_CHECK_MS);
  for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => end(130));
  terminal?.on("SIGINT", () => end(130));

  await until(({ event }) => event === "login");
  perform({ command: "getu", prefix: "" });
  prompt();
  for await (const line of lines) {
    const typed = parseCommand(line);
    trace?.restart();
    if (typed instanceof Error) say({ event: "error", code: "usage", message: typed.message });
    else if (typed === "help") show(HELP, args.json ? "stderr" : "stdout");
    else if (typed?.command === "sleep") await new Promise((done) => setTimeout(done, typed.seconds * 1000));
    else if (typed?.command === "exit") break;
    else if (typed) await (terminal ? perform(typed) : carryOut(typed));
    prompt();
  }
  end(hasFailed && !terminal ? 1 : 0);
}

if (import.meta.main) await main().catch(exitWith);
