/**
 * The client: logs in, sends chat messages over the server at once, punches a hole meanwhile, and moves the
 * conversation to the direct path as soon as an echo has come back over it.
 *
 *     alice            NAT          server          NAT            bob
 *       | P2PTRANS "hi" |             |              |              |
 *       |---------------------------->|   P2PSOMEONEWANTTOCALLYOU   |
 *       |        INTRODUCTION         |---------------------------->|  bob has "hi" after one server hop
 *       |<----------------------------|                             |
 *       | punch ------->|~~~~~~~~~~~> X              |              |  bob's NAT knows no alice yet ...
 *       |               |             |              |<------ punch |
 *       |<--------------|<~~~~~~~~~~~~~~~~~~~~~~~~~~~|              |  ... but alice's NAT has seen alice write to bob:
 *       | echo -------->|~~~~~~~~~~~~~~~~~~~~~~~~~~~>|------------->|  both holes are open
 *
 * A path to a peer is `trying` until an echo of our own punch comes back, then `good`; `suspect` when something on it
 * stays unanswered (everything then goes over the server as well), and gone when fast probes stay unanswered too.
 *
 * @module
 */
import { randomBytes } from "node:crypto";
import { lookup } from "node:dns/promises";
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { networkInterfaces } from "node:os";
import process from "node:process";
import { clearLine, createInterface, cursorTo } from "node:readline";
import {
  accept,
  type Bucket,
  clock,
  concat,
  type Control,
  type ControlBody,
  controlHeader,
  controlKeys,
  createTrace,
  type Datagram,
  decode,
  decodeHandshake,
  decodeInner,
  decodeStun,
  DEFAULT_PORT,
  diffieHellman,
  type Effect,
  encode,
  encodeHandshake,
  encodeInner,
  encodeStunRequest,
  type Endpoint,
  environment,
  exitWith,
  Failure,
  formatEndpoint,
  fullBucket,
  generateKeys,
  type Handshake,
  harmless,
  hex,
  hostOf,
  initiate,
  type Initiation,
  type Introduced,
  isIPv6,
  jsonLine,
  keyFromWords,
  type KeyPair,
  keysFrom,
  listen,
  listenOrFail,
  loginKey,
  type Machine,
  MAX_CANDIDATES,
  MAX_NAME_BYTES,
  MAX_PART_BYTES,
  MAX_PLANNED_PORTS,
  type NatClass,
  type NoiseKeys,
  openPeer,
  parseEndpoint,
  passwordProof,
  type Peer,
  peerHeader,
  publicNonce,
  type Rate,
  type ReplayWindow,
  replayWindow,
  respond,
  safetyCode,
  scopeOf,
  sealPeer,
  secretWords,
  spend,
  type Stun,
  STUN_COOKIE,
  UsageError,
  type User,
  userName,
  verifies,
} from "./protocol.ts";

// ---------------------------------------------------------------------------------------------------- constants

/** Longest chat message in bytes of UTF-8. */
export const MAX_MESSAGE_BYTES = 65_536;

// Towards the server.
const FIRST_LOGIN_MS = 10_000;
/** Between two attempts to log in: grows by half each time, up to the second number. */
const LOGIN_RETRY_MS = 400, LOGIN_RETRY_MAX_MS = 3_000;
/** After so many attempts without a word from the server everything is forgotten that it has said. */
const TRIES_BEFORE_ANEW = 4;
/** Under the 30 s after which the strictest NATs forget (RFC 4787 REQ-5 asks for 2 min; few heed it). */
const KEEPALIVE_MS = 20_000;
/** While a conversation lives on the relay: a restarted server must be noticed before a message fails. */
const RELAY_KEEPALIVE_MS = 2_000;
/** While one goes on directly: a carrier may end all our mappings at once, and no message may wait 15 s for the next. */
const WARM_KEEPALIVE_MS = 10_000;
/** Keepalives of several clients, or several paths, must not fall into step. */
const SPREAD = 0.2;
/** So many keepalives in a row unanswered, and nothing else heard from it: the server is gone. */
const KEEPALIVE_TRIES = 8;
/** So long after its restart the last client may come back: one that has just sent its keepalive before. */
const ALL_BACK_MS = 30_000;
const LIST_RETRY_MS = 500, LIST_TRIES = 8;
/** Answers to cookies without anything between that shows progress; more would be a loop. */
const MAX_CHALLENGES = 5;

// Punching.
/** After the introduction: quick at first, since both sides punch now; then until the slowest NAT has noticed. */
const PUNCH_AT_MS = [0, 20, 40, 80, 160, 320, 820, 1320, 1820, 2320, 2820, 3320, 3820, 4320];
/** After so many seconds on the relay a direct path is tried again. */
const RETRY_DIRECT_MS = [2_000, 5_000, 15_000, 60_000, 300_000];
/** Rounds of "ask the server to have the other side punch, then send again", as in 2004. */
const MAX_ROUNDS = 5;
/** So many tries of the part that all others wait for, over the relay: the peer may have forgotten the session. */
const FORGOTTEN_AFTER = 4;
const MAX_PATHS = 32;
const MAX_PROBES = 256;

// Knowing one's NAT.
/** A STUN question is asked again so often; what is unanswered then has been filtered, or lost. */
const QUERY_MS = 250, QUERY_TRIES = 4;
/** Three random ports lie within a block by chance once in 80 times, four once in a thousand. */
const SAMPLES = 4;
/** Ports of successive mappings this near to each other are a sequence, or this near, a block. */
const SEQUENCE_STEP = 8, BLOCK_SPAN = 4_096;
/** How far a block may reach beyond what we have seen of it. */
const BLOCK_GUESS = 512;
const UNKNOWN_NAT: NatClass = { mapping: "unknown", filtering: "unknown", allocation: "unknown" };

// Harder NATs.
/** A plain punch has so long; then fresh sockets, with fresh mappings, have their try. */
const FRESH_SOCKETS_AFTER_MS = 1_500;
/** Sockets that we open: one guess each against another symmetric NAT; a few are enough where the peer sprays or sweeps. */
const GUESSES = 16, FEW = 4, SPRAY_SOCKETS = 256;
/** Foreign flows that may have taken a port of a sequence since it was sampled: so many are guessed in turn. */
const FOREIGN_FLOWS = 4;
/** When an attempt sends; where one side opens its NAT with packets of low TTL, the next ones follow the peer's. */
const VOLLEYS_MS = [0, 100, 250], OPENER_VOLLEYS_MS = [0, 500], SPRAY_VOLLEYS_MS = [0, 6_200];
/** When a plan is told again, an attempt has failed, or a spray: in all of its time, and a little for the last echo. */
const TELL_PLAN_MS = 300, ATTEMPT_MS = 1_000, SPRAY_ATTEMPT_MS = 13_000, MAX_ATTEMPT = 4;
/** The number of an attempt that replaces a path which still works. */
const RENEWAL = 100, RENEWED_MS = 10_000;
/** Dies on the way, after it has opened our NAT and before a Linux router at the far end can take offence at it. */
const OPENER_TTL = 8;
/** A spray: so many ports, so many at a time, a little ahead at first; half of them, a pause, the other half; never more. */
const SPRAY_PORTS = 2_048,
  SPRAY_BURST = 4,
  SPRAY_BURST_MS = 20,
  SPRAY_AHEAD_MS = 60,
  SPRAY_PAUSE_MS = 1_000,
  SPRAY_INTERVAL_MS = 14_000;
const LOWEST_PORT = 1_024, PORTS = 65_536 - LOWEST_PORT;

// Keeping a path.
/** A message went either way so recently: then the path is checked all the time. */
const ACTIVE_MS = 10_000, ACTIVE_PROBE_MS = 400;
/** A message went either way so recently: then the path is kept open. */
const WARM_MS = 300_000, WARM_PROBE_MS = 15_000;
/** Something on the path unanswered for max(3 SRTT, this): suspect. */
const SUSPECT_MS = 400;
/** A suspect path is probed so often, and given up after so many probes in a row without an echo. */
const FAST_PROBE_MS = 150, FAST_PROBES = 6;
/** After so many of them the server is asked for a new introduction. */
const FAST_PROBES_BEFORE_CALL = 2;
/** A path unused for so long is not trusted to be there still. */
const STALE_PATH_MS = 30_000;
/** Two paths in a row that die at about the same age, under 90 s: the next one is replaced at 70 % of it. */
const ABSOLUTE_LIFETIME_MS = 90_000, SAME_LIFETIME = 0.75, RENEW_AT = 0.7;
/** Of two paths of the same kind the quicker one is taken if it is quicker by this factor and this much. */
const QUICKER_FACTOR = 0.9, QUICKER_MS = 5;

// Delivery.
const RTO_FIRST_MS = 400, RTO_MIN_MS = 200, RTO_MAX_MS = 2_000, RTO_GROWTH = 1.5;
/** Not sooner than the clocks of two runtimes can tell (a tail loss probe, RFC 8985, section 7.2). */
const TAIL_MIN_MS = 20;
/** Nothing acknowledged for so long: Send Failure! */
const GIVE_UP_MS = 15_000;
/** What all else waits for is sent again in as many copies as it has been tried, up to this. */
const MAX_COPIES = 4;
/** Sent so much before a part that has been acknowledged: lost (a fraction of SRTT, as in RACK, RFC 8985). */
const REORDERING = 0.25;
/** Parts on their way at a time: at first, at least, at most. Twice the most fits into one acknowledgement. */
const WINDOW_FIRST = 16, WINDOW_MIN = 4, WINDOW_MAX = 64;
/** The clock has jumped, as on a laptop that slept: nothing that fell due meanwhile has failed for that. */
const JUMP_MS = 5_000;
/** AES-GCM keys are changed long before 2^32 messages. */
const REKEY_AFTER = 2 ** 30;
const PING_INTERVAL_MS = 500, PING_LOST_MS = 2_000;

// What a peer or the server can make grow or make us do.
const MAX_CONVERSATIONS = 1_000, MAX_KNOWN_USERS = 20_000, MAX_LISTED = 1_000_000;
const HANDSHAKES_PER_PEER: Rate = { perSecond: 5, burst: 20 };
const INTRODUCTIONS_PER_PEER: Rate = { perSecond: 5, burst: 20 };
/** Attempts with more sockets, and such sockets at a time: two sprays and what else is going on. */
const ATTEMPTS_PER_PEER: Rate = { perSecond: 0.2, burst: 6 }, MAX_SOCKETS = 600;
/** Datagrams to where nothing has come back from yet, whoever named the place. */
const PUNCHES: Rate = { perSecond: 300, burst: 1_500 };
/** The same for one peer, sprays and sweeps aside: these have a limit of their own, and go to one host alone. */
const PUNCHES_PER_PEER: Rate = { perSecond: 30, burst: 300 };
/** Of peers who do not know what they must know. */
const WARNINGS: Rate = { perSecond: 0.2, burst: 10 };
const MAX_EPHEMERALS = 4_096;
const MAX_SESSIONS = 4;

// ---------------------------------------------------------------------------------------------------- types

/** Which way a datagram takes: over the server, directly, or directly to a private or loopback address. */
export type PathKind = "relay" | "direct" | "lan";

/** Why a message was not delivered. */
export type Reason = "unknown" | "offline" | "timeout" | "empty" | "too-long" | "untrusted";

/** What the client tells its user (DESIGN 6). An error with a `notice` is what others did, not what became of a command. */
export type ClientEvent =
  | { event: "login"; name: string; server: Endpoint; public: Endpoint; local: Endpoint[]; users: number }
  | { event: "users"; users: { name: string; public: Endpoint }[] }
  | { event: "message"; from: string; text: string; path: PathKind; id: string }
  | { event: "sent"; to: string; id: string; ok: true; ms: number; path: PathKind }
  | { event: "sent"; to: string; id: string; ok: false; ms: number; path: PathKind; reason: Reason }
  | { event: "path"; peer: string; path: PathKind; address: Endpoint; rttMs: number | null; ms: number }
  | { event: "ping"; peer: string; path: PathKind; rttMs: number | null; lost: number }
  | { event: "verify"; peer: string; code: string }
  | NatEvent
  | { event: "error"; code: string; message: string; fatal?: true; notice?: true }
  | { event: "reconnecting" | "reconnected" | "logout"; name: string; reason: string };

/** What we know of the NAT that we are behind; null: not known. */
export interface NatEvent extends NatClass {
  /** The name of the event. */
  event: "nat";
  /** As the server sees us. */
  public: Endpoint;
  /** Whether two behind it reach each other by its public address. */
  hairpin: boolean | null;
  /** Whether UDP passes at all. */
  udp: boolean;
}

/** What the user can ask for. */
export type Command =
  | { command: "send"; to: string; text: string }
  | { command: "getu"; prefix: string }
  | { command: "path"; peer: string | null }
  | { command: "ping"; peer: string; count: number }
  | { command: "verify"; peer: string }
  | { command: "nat" }
  | { command: "exit" };

/** What a client is made of; everything random comes in here. */
export interface ClientOptions {
  /** User name, as `userName` leaves it. */
  name: string;
  /** Our static keys. */
  keys: KeyPair;
  /** The server, in one IP version or both. */
  servers: Endpoint[];
  /** So many unpredictable bytes. */
  random: (length: number) => Uint8Array;
  /** Fresh keys, one pair for each handshake. */
  generateKeys: () => KeyPair;
  /** What the two colleagues alone know: 32 bytes. */
  psk?: Uint8Array | undefined;
  /** scrypt of the server's password. */
  password?: Uint8Array | undefined;
  /** The keys outlive this run: the name is to be held for us. */
  keepName?: boolean | undefined;
  /** Another STUN server, at another address than ours. */
  observer?: Endpoint | undefined;
  /** False: never punch, stay on the relay. */
  direct?: boolean | undefined;
  /** Never give up the first login. */
  patient?: boolean | undefined;
}

/** A client without sockets. */
export interface Client extends Machine<ClientEvent> {
  /** Carries out a command. */
  command(command: Command, now: number): Effect<ClientEvent>[];
  /** Tells the IP addresses of this host's interfaces, at the start and when they change. */
  interfaces(addresses: string[], now: number): Effect<ClientEvent>[];
}

/** Round-trip times and the time-out that follows from them (RFC 6298). */
interface Estimator {
  srtt: number | null;
  rttvar: number;
}

/** A session with the server; all times are those of `now`, all counters those of the seals. */
interface Session {
  server: Endpoint;
  token: string;
  /** As other users know this login. */
  nonce: string;
  keys: { toServer: Uint8Array; toClient: Uint8Array };
  window: ReplayWindow;
  sent: number;
  /** As the server sees us. */
  public: Endpoint;
  secondPort: number;
  keepaliveAt: number;
  /** Keepalives that wait for an answer: the counters of the first and the last, and when that was sent. */
  asked: { first: number; counter: number; at: number; tries: number } | null;
  /** Cookies that we have brought back, since the last ALIVE. */
  challenges: number;
}

/** A login under way, the first one or another. */
interface Login {
  /** Known to us and the server alone. */
  id: string;
  /** Its counter: of two logins with one key the greater is the later. */
  clock: number;
  since: number;
  tries: number;
  nextAt: number;
  challenges: number;
  askedAt: number;
  /** Once the server has asked us to show that we receive here. */
  cookie: { cookie: string; server: Endpoint; shared: Uint8Array } | null;
}

/** A way to the peer: from one of our sockets to one of its endpoints. */
interface Path {
  endpoint: Endpoint;
  socket: number;
  kind: "direct" | "lan";
  /** Only the path in use is more than `trying`. */
  state: "trying" | "good" | "suspect";
  rtt: Estimator;
  /** Since when something sent on it waits for an answer. */
  waitingSince: number;
  answeredAt: number;
  bornAt: number;
  probeAt: number;
  /** Probes since it has become suspect. */
  fastProbes: number;
}

/** A session with a peer, after the handshake. */
interface Secure {
  /** Our index of it, in what we receive. */
  index: number;
  /** The peer's index of it, in what we send. */
  theirs: number;
  keys: NoiseKeys;
  window: ReplayWindow;
  sent: number;
  /** The peer's login and key when it began. */
  peerNonce: string;
  peerKey: string;
  /** What numbers the peer's parts. */
  stream: string;
  /** We answered, and the peer has not yet shown that it knows: until then everything we send carries the answer. */
  second: Uint8Array | null;
}

/** We are opening a session with the peer: first by asking the server who that is, then with a handshake. */
interface Opening {
  tries: number;
  dueAt: number;
  handshake: { index: number; initiation: Initiation } | null;
}

/** A chat message of ours. */
interface Message {
  id: string;
  startedAt: number;
}

/** A piece of it, which fits into a datagram; `left` more follow. */
interface Part {
  seq: number;
  left: number;
  bytes: Uint8Array;
  message: Message;
  /** 0: never yet. */
  tries: number;
  sentAt: number;
  /** When to send it again; Infinity: it is there, or inside a handshake, which sees to it. */
  dueAt: number;
  /** Which way it went last. */
  over: Path | null;
  /** The peer has it; how its first copy came. */
  came: PathKind | null;
}

/** What comes from the peer. */
interface Incoming {
  /** Of the peer's program: it begins anew with that. */
  stream: string;
  /** All before this has been delivered or given up. */
  next: number;
  parts: Map<number, { left: number; part: Uint8Array }>;
  /** How the first copy of each recent part came. */
  came: Map<number, PathKind>;
  /** The parts so far of the message that comes next. */
  message: Uint8Array[];
}

/** All that is between us and one other user. */
interface Conversation {
  name: string;
  /** The server's latest word on who that is. */
  peer: Introduced | null;
  /** It has another key than the one that was verified, or does not know our secret. */
  untrusted: boolean;
  /** The login of it that the user has been warned of. */
  warnedOf: string | null;
  /** Sessions that the peer may still use, newest first, and the one that we use. */
  sessions: Secure[];
  secure: Secure | null;
  opening: Opening | null;
  /** What it may have us do. */
  handshakes: Bucket;
  attempts: Bucket;
  punches: Bucket;
  introductions: Bucket;

  // Messages. `stream` is ours for this conversation, and numbers our parts, of which `parts` are not done yet.
  stream: string;
  nextSeq: number;
  parts: Part[];
  /** Parts that may be on their way at a time. */
  window: number;
  /** When something was acknowledged last. */
  progressAt: number;
  incoming: Incoming | null;
  /** Acknowledge as soon as there is a session. */
  ackDue: boolean;
  lastError: Reason | null;

  // Paths. Since when we have been looking for one:
  calledAt: number;
  /** How often we have asked for an introduction, and when to ask again for one that has not come. */
  rounds: number;
  askAt: number;
  punching: { from: number; step: number } | null;
  /** While there is only the relay: how often we have tried anew, and when we do again. */
  retries: number;
  retryAt: number;
  attempt: Attempt | null;
  paths: Path[];
  /** The one in use; null: the relay. */
  best: Path | null;
  /** How long the last two paths lived, and when to move to another before this one dies too. */
  lifetimes: number[];
  renewAt: number;
  relayRtt: Estimator;
  /** When a message went either way last. */
  talkedAt: number;
  /** Punches and pings that wait for their echo; a `swept` one went to many ports, whichever answers is the path. */
  probes: Map<number, { path: Path | null; at: number; kind: "punch" | "ping" | "swept" }>;
  ping: { since: number; left: number; lost: number; nextAt: number; waiting: number | null } | null;
}

/** What we ask a STUN server: how it sees one of our sockets, maybe answered from its other address or port. */
interface Question {
  socket: number;
  to: Endpoint;
  changeIp?: boolean;
  changePort?: boolean;
}

interface Query extends Question {
  data: Uint8Array;
  tries: number;
  dueAt: number;
  done(answer: Stun | null): void;
}

/** What discovery has found out; undefined: not yet, or no answer. */
interface Facts {
  /** Our public address is one of our own. */
  isNone: boolean;
  /** How we are seen at the server's second port, and at another address. */
  secondPort?: Endpoint | undefined;
  elsewhere?: Endpoint | undefined;
  /** Whether we hear from a port, and from an address, that we have never written to. */
  thirdPort?: boolean;
  otherAddress?: boolean;
  /** Fresh sockets: their port inside and outside, in the order of their first packets; 0: no answer. */
  samples: { socket: number; inside: number; outside: number }[];
}

/** An attempt with more than one socket or more than one port. */
interface Attempt {
  number: number;
  startedAt: number;
  endAt: number;
  /** Whom it takes for symmetric, and whether our ports cannot be foretold. */
  symmetric: boolean;
  peerSymmetric: boolean;
  random: boolean;
  /** Whether all openers of a spray die on the way: not once that has failed, as our own NAT may be farther away. */
  careful: boolean;
  /** The sockets opened for it; none: socket 0 serves. */
  sockets: { socket: number; port: number }[];
  plan: (Peer & { type: "P2PPLAN" }) | null;
  theirs: (Peer & { type: "P2PPLAN" }) | null;
  /** When our plan is told (again), and the next volley leaves. */
  tellAt: number;
  volley: number;
  volleyAt: number;
  /** The next of a sequence of ports without repeats; the first ones are those of the peer's block. */
  spray: { next: number; at: number; first: number; stride: number; block: number[] } | null;
}

/** Where a datagram came from; null: over the relay. */
type Origin = { socket: number; from: Endpoint } | null;

/** One side of a handshake. */
type Party = Pick<User, "name" | "nonce">;

interface Listing {
  prefix: string;
  after: string;
  users: User[];
  pages: Map<number, User[]>;
  asked: number;
  tries: number;
  dueAt: number;
  done(users: User[]): void;
}

// ---------------------------------------------------------------------------------------------------- pure functions

const NO_ID = "0".repeat(16);
const NO_BYTES = new Uint8Array(0);
const utf8 = new TextEncoder();
const fromUtf8 = new TextDecoder("utf-8", { ignoreBOM: true });
const KINDS: (PathKind | null)[] = [null, "relay", "direct", "lan"];

const tenths = (ms: number) => Math.round(ms * 10) / 10;

const newEstimator = (): Estimator => ({ srtt: null, rttvar: 0 });

function sample(estimator: Estimator, rttMs: number): void {
  if (rttMs > JUMP_MS) return;
  const { srtt, rttvar } = estimator;
  estimator.rttvar = srtt === null ? rttMs / 2 : 0.75 * rttvar + 0.25 * Math.abs(srtt - rttMs);
  estimator.srtt = srtt === null ? rttMs : 0.875 * srtt + 0.125 * rttMs;
}

function timeout({ srtt, rttvar }: Estimator, tries: number): number {
  const first = srtt === null ? RTO_FIRST_MS : Math.max(RTO_MIN_MS, srtt + 4 * rttvar);
  return Math.min(RTO_MAX_MS, first * RTO_GROWTH ** (tries - 1));
}

/** The last part has none behind it whose acknowledgement would tell of its loss: it is sent again sooner, once. */
function tailTimeout({ srtt, rttvar }: Estimator): number {
  return srtt === null ? RTO_FIRST_MS : Math.min(RTO_MAX_MS, Math.max(TAIL_MIN_MS, 2 * srtt, srtt + 4 * rttvar));
}

const patience = (path: Path) => Math.min(RTO_MAX_MS, Math.max(SUSPECT_MS, 3 * (path.rtt.srtt ?? 0)));

function kindOf(endpoint: Endpoint): "direct" | "lan" {
  const scope = scopeOf(hostOf(endpoint));
  return scope === "private" || scope === "loopback" ? "lan" : "direct";
}

/** Two bits for each part from `from`: missing, or how its first copy came. */
function packStates(came: Map<number, PathKind>, from: number): Uint8Array {
  const states = new Uint8Array(WINDOW_MAX / 2);
  for (const [seq, kind] of came) {
    const i = seq - from;
    if (i >= 0 && i < 2 * WINDOW_MAX) states[i >> 2]! |= KINDS.indexOf(kind) << 2 * (i & 3);
  }
  return states;
}

function stateOf(states: Uint8Array, i: number): PathKind | null {
  return i < 0 ? null : KINDS[(states[i >> 2] ?? 0) >> 2 * (i & 3) & 3]!;
}

/** The class of NAT that the facts leave; what one address of a server cannot tell stays unknown. */
function classOf({ isNone, secondPort, elsewhere, thirdPort, otherAddress, samples }: Facts, seen: Endpoint): NatClass {
  const mapping = isNone
    ? "EIM"
    : secondPort !== undefined && secondPort !== seen
    ? "APDM"
    : elsewhere === undefined
    ? "unknown"
    : elsewhere === seen
    ? "EIM"
    : "ADM";
  const filtering = thirdPort === undefined
    ? "unknown"
    : !thirdPort
    ? "APDF"
    : otherAddress === undefined
    ? "unknown"
    : otherAddress
    ? "EIF"
    : "ADF";
  return { mapping, filtering, allocation: allocationOf(samples) };
}

function allocationOf(samples: Facts["samples"]): NatClass["allocation"] {
  const ports = samples.filter(({ outside }) => outside > 0);
  if (ports.length < SAMPLES - 1) return "unknown"; // one may be lost, four times over
  if (ports.every(({ inside, outside }) => inside === outside)) return "preserving";
  if (stepOf(ports) !== 0) return "sequential";
  const outside = ports.map((port) => port.outside);
  return Math.max(...outside) - Math.min(...outside) <= BLOCK_SPAN ? "block" : "random";
}

/** The step of a sequence of ports, with its sign; 0 if it is none. */
function stepOf(samples: Facts["samples"]): number {
  const steps = samples.slice(1).map(({ outside }, i) => outside - samples[i]!.outside);
  const sign = Math.sign(steps[0] ?? 0);
  const isSequence = steps.every((step) => Math.sign(step) === sign && Math.abs(step) <= SEQUENCE_STEP);
  return isSequence ? sign * Math.min(...steps.map(Math.abs)) : 0;
}

/** Symmetric: a new destination gets a new port. */
const isSymmetric = ({ mapping }: NatClass) => mapping === "APDM" || mapping === "ADM";
/** ... and nobody can tell which. */
const isRandom = (nat: NatClass) => isSymmetric(nat) && !isPredictable(nat);

const isPredictable = ({ allocation }: NatClass) => allocation === "preserving" || allocation === "sequential";

/**
 * Whom an attempt takes for symmetric: those who are and, once plain punches and fresh sockets have failed, one whose
 * mapping a single server could not tell from ADM (escalation follows packets, not labels).
 */
function isTakenForSymmetric(
  who: NatClass,
  other: NatClass,
  { number, isFirst }: { number: number; isFirst: boolean },
): boolean {
  if (who.mapping !== "unknown" || number < 2) return isSymmetric(who);
  if (isPredictable(who)) return number !== 3 && !isRandom(other); // costs little: first, and once more at last
  if (isSymmetric(other)) return false;
  const comesFirst = other.mapping !== "unknown" || (!isPredictable(other) && isFirst);
  return number === (comesFirst ? 2 : 3);
}

/** The nearest number that, as a stride, visits all PORTS = 2^10 x 3^2 x 7 of them once. */
function coprime(start: number): number {
  let stride = start | 1;
  while (stride % 3 === 0 || stride % 7 === 0) stride += 2;
  return stride;
}

/** What a handshake is about: who with whom, in which login of each. Names have no blanks. */
const prologue = (initiator: Party, responder: Party) =>
  utf8.encode(`punch ${initiator.name} ${initiator.nonce} ${responder.name} ${responder.nonce}`);
const isLower = (one: Uint8Array, other: Uint8Array) => hex(one) < hex(other);

/** Candidates that may be sent to: nothing on this link, this host (unless the server sees us there), or nowhere. */
function usable(candidate: Endpoint, own: Endpoint): boolean {
  const scope = scopeOf(hostOf(candidate));
  return scope === "public" || scope === "private" || (scope === "loopback" && scopeOf(hostOf(own)) === "loopback");
}

// ---------------------------------------------------------------------------------------------------- machine

/** Makes a client; it logs in as soon as its socket 0 is open. */
export function createClient(options: ClientOptions): Client {
  const { name, keys, servers, random, psk = new Uint8Array(32), direct = true } = options;
  const conversations = new Map<string, Conversation>();
  /** Of each session and handshake: by the index that we chose for it. */
  const byIndex = new Map<number, { conversation: Conversation; secure: Secure | null }>();
  /** First messages of handshakes seen, by their ephemeral key: a second one is a copy, never a new handshake. */
  const ephemerals = new Map<string, { conversation: Conversation; secure: Secure | null }>();
  const known = new Map<string, User>();
  /** Keys, as hex, that `verify` has shown to the user: no other key counts for that name from then on. */
  const verified = new Map<string, string>();
  const listings: Listing[] = [];
  const serverRtt = newEstimator();
  let session: Session | null = null, login: Login | null = null;
  let addresses: string[] = [], port = 0;
  let nat = UNKNOWN_NAT, hairpin: boolean | null = null;
  /** Of a sequential allocation: the step; of one in blocks: lowest and highest port that may belong to ours. */
  let stride = 1, block: number[] = [];
  /** Under way; `again`: what it finds is of yesterday. And who waits for what comes of it. */
  let discovery: { again: boolean } | null = null;
  const waitingForNat: (() => void)[] = [];
  /** Our class of NAT is another one, and the server is yet to confirm that it knows. */
  let isNews = false;
  const queries = new Map<string, Query>();
  /** Sockets that are being opened; who wants them. */
  const opening = new Map<number, (port: number) => void>();
  const openSockets = new Set<number>();
  let sockets = 1, sprayedAt = -Infinity;
  const punches = fullBucket(PUNCHES, 0), warnings = fullBucket(WARNINGS, 0);
  /** When the server has last been restarted, as far as we can tell. */
  let forgottenAt = -Infinity;
  /** Logged out, refused, or no server found: nothing happens any more. */
  let isClosed = false;
  /** Of the event that is being handled, in ms; and what it has led to so far. */
  let now = 0, effects: Effect<ClientEvent>[] = [];

  const emit = (event: ClientEvent) => void effects.push({ kind: "event", event });
  const send = (socket: number, to: Endpoint, data: Uint8Array, ttl?: number) =>
    void effects.push(ttl === undefined ? { kind: "send", socket, to, data } : { kind: "send", socket, to, data, ttl });
  const randomNumber = (bits: number) => random(4).reduce((sum, byte) => sum * 256 + byte, 0) % 2 ** bits;
  const spread = (ms: number) => ms * (1 - SPREAD + 2 * SPREAD * randomNumber(16) / 2 ** 16);
  const rttForServer = () => Math.min(65_535, Math.round(serverRtt.srtt ?? 0));
  const local = () =>
    addresses.filter((address) => scopeOf(address) === "private").slice(0, MAX_CANDIDATES)
      .map((address) => formatEndpoint(address, port));

  // -- the server: logging in and staying in

  function tell(message: ControlBody, to = session!.server): number {
    const counter = ++session!.sent;
    send(0, to, encode(message, { id: session!.token, counter, key: session!.keys.toServer }));
    return counter;
  }

  function beginLogin(delay = 0): void {
    login = {
      id: hex(random(8)),
      clock: Math.floor(now),
      since: now,
      tries: 0,
      nextAt: now + delay,
      challenges: 0,
      askedAt: now,
      cookie: null,
    };
  }

  function sendLogin(): void {
    const { id, clock, cookie } = login!;
    login!.nextAt = now + Math.min(LOGIN_RETRY_MAX_MS, LOGIN_RETRY_MS * RTO_GROWTH ** login!.tries);
    // The IP versions take turns until one of them has answered.
    const to = cookie?.server ?? servers[login!.tries % servers.length]!;
    login!.tries++;
    login!.askedAt = now;
    const proof = cookie && options.password ? passwordProof(cookie.shared, { password: options.password, id }) : NO_ID;
    const message = {
      type: "LOGIN",
      cookie: cookie?.cookie ?? NO_ID,
      key: keys.public,
      proof,
      keepName: Number(options.keepName ?? false),
      rttMs: rttForServer(),
      name,
      local: local(),
    } as const;
    const key = cookie ? loginKey(cookie.shared, id) : undefined;
    send(0, to, encode(message, { id, counter: clock, key }));
  }

  function onCookie(message: Control & { type: "COOKIE" }, from: Endpoint): void {
    if (login && message.id === login.id && message.counter === login.clock) {
      const shared = diffieHellman(keys.secret, message.key);
      if (!shared || login.challenges++ >= MAX_CHALLENGES) return;
      if (login.tries === 1) sample(serverRtt, now - login.askedAt);
      login.cookie = { cookie: message.cookie, server: from, shared };
      sendLogin();
    } else if (session && message.id === session.token) {
      if (message.known) { // we have moved
        if (session.challenges++ < MAX_CHALLENGES) keepalive(message.cookie, from);
      } else if (!session.asked) keepalive(); // a hint, but anybody on the way could have replayed it
      else if (message.counter >= session.asked.first && !login) { // the question itself is answered so: it is true
        const shared = diffieHellman(keys.secret, message.key);
        reconnect("the server has forgotten us");
        forgottenAt = now;
        if (!shared) return;
        login!.cookie = { cookie: message.cookie, server: from, shared };
        sendLogin();
      }
    }
  }

  function onWelcome(message: Control & { type: "WELCOME" }, data: Uint8Array): void {
    if (!login?.cookie || message.id !== login.id) return;
    const { shared, server } = login.cookie;
    const macs = controlKeys(shared, message.token);
    if (!verifies(data, macs.toClient)) return;
    if (login.tries === 2) sample(serverRtt, now - login.askedAt);
    const before = session;
    session = {
      server,
      token: message.token,
      nonce: publicNonce(message.id),
      keys: macs,
      window: replayWindow(),
      sent: login.clock,
      public: message.public,
      secondPort: message.secondPort,
      keepaliveAt: now + spread(KEEPALIVE_MS),
      asked: null,
      challenges: 0,
    };
    login = null;
    for (const user of message.users) learn(user);
    if (before) emit({ event: "reconnected", name, reason: "" });
    else emit({ event: "login", name, server, public: message.public, local: local(), users: message.total });
    discover();
    const other = servers.find((endpoint) => isIPv6(endpoint) !== isIPv6(server));
    if (other) keepalive(NO_ID, other);
    for (const conversation of conversations.values()) {
      dropHandshake(conversation); // begun under the nonce of the login before
      if (before && isWarm(conversation)) callAgain(conversation);
      pump(conversation);
    }
    if (before) { for (const listing of listings) listing.dueAt = now; }
  }

  function onRefusal(message: Control & { type: "ERROR" }, data: Uint8Array): void {
    if (!login?.cookie || !verifies(data, loginKey(login.cookie.shared, login.id))) return;
    const texts: Record<string, string> = {
      "name-taken": `Somebody else is "${name}": choose another name` +
        (message.seconds > 0 ? `, or try again in ${message.seconds} s` : ""),
      "bad-name": `The server does not accept the name "${name}": 1 to 32 bytes without blanks`,
      "bad-password": "The server asks for its password: give it with --password-file",
      "full": "The server is full: try again later",
    };
    isClosed = !session;
    const fatal = isClosed ? { fatal: true as const } : {};
    emit({ event: "error", code: message.reason, message: texts[message.reason] ?? "The server refuses us", ...fatal });
  }

  function reconnect(reason: string, delay = 0): void {
    if (!login) emit({ event: "reconnecting", name, reason });
    beginLogin(delay);
  }

  function keepalive(cookie = NO_ID, to = session!.server): void {
    const counter = tell({ type: "KEEPALIVE", cookie, rttMs: rttForServer(), nat, local: local() }, to);
    if (to !== session!.server) return;
    const { first, tries } = session!.asked ?? { first: counter, tries: 0 };
    session!.asked = { first, counter, at: now, tries: tries + 1 };
    session!.keepaliveAt = now + timeout(serverRtt, session!.asked.tries);
  }

  function onAlive(message: Control & { type: "ALIVE" }, from: Endpoint): void {
    session!.challenges = 0;
    if (from !== session!.server) return;
    const isLatest = session!.asked?.counter === message.asked;
    if (isLatest) sample(serverRtt, now - session!.asked!.at);
    session!.asked = null;
    session!.keepaliveAt = now +
      spread(onRelay() ? RELAY_KEEPALIVE_MS : warm().length > 0 ? WARM_KEEPALIVE_MS : KEEPALIVE_MS);
    if (login) { // it was there all the time
      login = null;
      emit({ event: "reconnected", name, reason: "" });
    }
    if (isNews && isLatest) {
      isNews = false;
      for (const c of warm()) if (!c.best) askForIntroduction(c);
    }
    if (message.public !== session!.public) {
      session!.public = message.public;
      discover();
      for (const conversation of warm()) callAgain(conversation);
    }
  }

  const warm = () => [...conversations.values()].filter(isWarm);
  const onRelay = () => warm().some(({ best }) => !best);

  function wakeLink(): void {
    if (login && now >= loginWakeAt()) {
      if (!session && !options.patient && now - login.since >= FIRST_LOGIN_MS) {
        const message = `No answer from the server at ${servers.join(" or ")}: is it running, and is UDP let through?`;
        emit({ event: "error", code: "unreachable", message, fatal: true });
        isClosed = true;
        return;
      }
      if (!session && options.patient && login.tries === 5) {
        emit({ event: "error", code: "unreachable", message: `No answer yet from ${servers.join(" or ")}, trying on` });
      }
      login.challenges = 0;
      if (login.tries > 0 && login.tries % TRIES_BEFORE_ANEW === 0) { // perhaps another address or IP version by now
        login.cookie = null;
        login.id = hex(random(8));
        login.clock = Math.max(login.clock + 1, Math.floor(now));
      }
      sendLogin();
    }
    if (!session || login || now < session.keepaliveAt) return;
    if ((session.asked?.tries ?? 0) >= KEEPALIVE_TRIES) return reconnect("the server does not answer");
    keepalive();
    const other = servers.find((endpoint) => isIPv6(endpoint) !== isIPv6(session!.server));
    if (other && session.asked!.tries === 1 && !onRelay()) keepalive(NO_ID, other);
  }

  const linkWakeAt = () => login ? loginWakeAt() : session ? session.keepaliveAt : Infinity;
  const loginWakeAt = () =>
    !session && !options.patient ? Math.min(login!.nextAt, login!.since + FIRST_LOGIN_MS) : login!.nextAt;

  function learn(user: User): void {
    known.delete(user.name);
    if (known.size >= MAX_KNOWN_USERS) known.delete(known.keys().next().value!);
    known.set(user.name, user);
    const conversation = conversations.get(user.name);
    if (conversation?.peer && conversation.peer.nonce !== user.nonce) {
      renew(conversation, { ...conversation.peer, nonce: user.nonce, key: user.key });
    }
  }

  // -- conversations: who the peer is, and the session with it

  function conversationWith(peerName: string): Conversation | null {
    const found = conversations.get(peerName);
    if (found) return found;
    if (conversations.size >= MAX_CONVERSATIONS) {
      // Those that only the other side has spoken in go first; of them those without a path, and the longest silent.
      const idle = [...conversations].filter(([, c]) => c.parts.length === 0);
      const [oldest] = idle.sort(([, a], [, b]) =>
        Math.sign(a.nextSeq) - Math.sign(b.nextSeq) || Number(a.best !== null) - Number(b.best !== null) ||
        a.talkedAt - b.talkedAt
      );
      if (!oldest) return null;
      forget(oldest[1]);
      conversations.delete(oldest[0]);
    }
    // What we send to ourselves comes back to somebody who is not us: the conversation with no name.
    const user = known.get(peerName || name);
    const conversation: Conversation = {
      name: peerName || name,
      peer: user ? { ...user, candidates: [], nat: UNKNOWN_NAT, punchAfterMs: 0 } : null,
      untrusted: false,
      warnedOf: null,
      sessions: [],
      secure: null,
      opening: null,
      handshakes: fullBucket(HANDSHAKES_PER_PEER, now),
      attempts: fullBucket(ATTEMPTS_PER_PEER, now),
      punches: fullBucket(PUNCHES_PER_PEER, now),
      introductions: fullBucket(INTRODUCTIONS_PER_PEER, now),
      stream: hex(random(8)),
      nextSeq: 0,
      parts: [],
      window: WINDOW_FIRST,
      progressAt: now,
      incoming: null,
      ackDue: false,
      lastError: null,
      calledAt: now,
      rounds: 0,
      askAt: Infinity,
      punching: null,
      attempt: null,
      retries: 0,
      retryAt: Infinity,
      paths: [],
      best: null,
      lifetimes: [],
      renewAt: Infinity,
      relayRtt: newEstimator(),
      talkedAt: -Infinity,
      probes: new Map(),
      ping: null,
    };
    conversation.untrusted = !isTrusted(conversation);
    conversations.set(peerName, conversation);
    return conversation;
  }

  /** As the user has typed the name; null if it is none. */
  function conversationTo(typed: string): Conversation | null {
    const peerName = userName(typed);
    return peerName === null ? null : conversationWith(peerName);
  }

  const isWarm = (c: Conversation) => now - c.talkedAt < WARM_MS;
  const isMirror = (c: Conversation) => c.name === name;

  function forget(c: Conversation): void {
    dropHandshake(c);
    if (c.attempt) endAttempt(c);
    dropPaths(c, () => false);
    for (const { index } of c.sessions) byIndex.delete(index);
  }

  /** No other key than the one that the user has seen, if he has. */
  const isTrusted = ({ name, peer }: Conversation) =>
    !peer || !verified.has(name) || verified.get(name) === hex(peer.key);

  /** The server's word on who the peer is now; false if it cannot be. */
  function renew(c: Conversation, peer: Introduced): boolean {
    const key = hex(peer.key), before = c.peer && hex(c.peer.key);
    if (key === hex(keys.public) && !isMirror(c)) return false; // our own messages would come back as somebody else's
    if (before !== null && before !== key) {
      const message = `The key of "${c.name}" has changed: it was started anew, or somebody else is in its place. ` +
        `Compare again with: verify ${c.name}`;
      emit({ event: "error", code: "key-changed", message, notice: true });
    }
    if (c.peer && (c.peer.nonce !== peer.nonce || before !== key)) {
      dropHandshake(c);
      c.rounds = 0;
    }
    c.peer = peer;
    c.untrusted = !isTrusted(c);
    if (c.untrusted) failAll(c, "untrusted");
    return !c.untrusted;
  }

  /** The session that what we send is sealed with; none if the peer has logged in anew since. */
  const sealing = ({ secure, peer }: Conversation) =>
    secure && peer && secure.peerNonce === peer.nonce && secure.peerKey === hex(peer.key) ? secure : null;

  function dropHandshake(c: Conversation): void {
    if (!c.opening?.handshake) return;
    byIndex.delete(c.opening.handshake.index);
    c.opening = { tries: 0, dueAt: 0, handshake: null };
    for (const part of c.parts.filter(isInHandshake)) part.dueAt = 0;
  }

  /** Opens a session with the peer, for what waits to be sent. */
  function open(c: Conversation): void {
    if (c.opening || !session) return;
    c.opening = { tries: 0, dueAt: now, handshake: null };
    sendOpening(c);
  }

  function sendOpening(c: Conversation): void {
    const opening = c.opening!;
    opening.handshake ??= c.peer && beginHandshake(c, c.peer);
    opening.dueAt = now + timeout(c.relayRtt, ++opening.tries);
    const calls = c.parts.length > 0 || c.ping !== null; // who only answers has been called
    for (let copy = 0; copy < Math.min(MAX_COPIES, opening.tries); copy++) {
      relay(c, opening.handshake ? firstMessage(c, 0) : NO_BYTES, { calls: calls && copy === 0 });
    }
  }

  /** Begins a handshake, with the oldest part inside if there is one. */
  function beginHandshake(c: Conversation, peer: Introduced): Opening["handshake"] {
    const part = oldest(c);
    const inner = part ? asMessage(c, part) : { type: "P2PTRASH", probe: newProbe(c, null) } as const;
    const initiation = initiate({
      own: keys,
      peer: peer.key,
      psk,
      prologue: prologue({ name, nonce: session!.nonce }, peer),
      ephemeral: options.generateKeys(),
    }, concat(Buffer.from(c.stream, "hex"), encodeInner(inner)));
    if (!initiation) return null;
    if (part) mark(part, { over: null, dueAt: Infinity }); // from here on the handshake sees to it
    const index = newIndex();
    byIndex.set(index, { conversation: c, secure: null });
    return { index, initiation };
  }

  function newIndex(): number {
    let index = randomNumber(32);
    while (byIndex.has(index)) index = randomNumber(32);
    return index;
  }

  function firstMessage(c: Conversation, probe: number): Uint8Array {
    const { index, initiation } = c.opening!.handshake!;
    return encodeHandshake({ type: "P2PFIRST", from: index, probe, noise: initiation.message });
  }

  function onFirst(c: Conversation, message: Handshake & { type: "P2PFIRST" }): void {
    const ephemeral = ephemeralOf(message);
    if (!c.peer || !session || !isTrusted(c) || !spend(c.handshakes, HANDSHAKES_PER_PEER, { now })) return;
    const response = respond({
      own: keys,
      peer: c.peer.key,
      psk,
      prologue: prologue(c.peer, { name, nonce: session.nonce }),
      ephemeral: options.generateKeys(),
    }, message.noise);
    const inner = response && response.payload.length > 8 ? decodeInner(response.payload.subarray(8)) : null;
    if (!response || !inner) return distrust(c);
    const stream = hex(response.payload.subarray(0, 8));
    let secure: Secure | null = null;
    if (!c.opening?.handshake || !isLower(keys.public, c.peer.key)) { // else ours goes on, and this one only brings its payload
      const { message: second, keys: made } = response.answer(Buffer.from(c.stream, "hex"));
      secure = newSecure(c, { index: newIndex(), theirs: message.from, keys: made, stream, second });
      dropHandshake(c);
      c.opening = null;
    }
    if (ephemerals.size >= MAX_EPHEMERALS) ephemerals.delete(ephemerals.keys().next().value!);
    ephemerals.set(ephemeral, { conversation: c, secure });
    openStream(c, stream);
    onFrame(c, { frame: inner, origin: null, stream });
    if (secure && secure !== c.secure) acknowledge(c, null, secure);
  }

  /**
   * A session that the peer began replaces a working one only when the peer has used it: its first message may have
   * been long on the way, and the peer have forgotten it.
   */
  function newSecure(c: Conversation, made: Pick<Secure, "index" | "theirs" | "keys" | "stream" | "second">): Secure {
    const { nonce: peerNonce, key } = c.peer!;
    const secure: Secure = { ...made, window: replayWindow(), sent: 0, peerNonce, peerKey: hex(key) };
    const works = sealing(c) && !c.secure!.second;
    c.sessions.unshift(secure);
    for (const { index } of c.sessions.splice(MAX_SESSIONS)) byIndex.delete(index);
    if (!secure.second || !works) c.secure = secure;
    c.untrusted = !isTrusted(c);
    byIndex.set(secure.index, { conversation: c, secure });
    return secure;
  }

  function onSecond(message: Handshake & { type: "P2PSECOND" }, origin: Origin): void {
    const entry = byIndex.get(message.to);
    const handshake = entry?.conversation.opening?.handshake;
    if (entry && handshake?.index === message.to) {
      const c = entry.conversation;
      const finished = handshake.initiation.finish(message.noise);
      if (!finished || finished.payload.length !== 8) return;
      const stream = hex(finished.payload);
      c.opening = null;
      newSecure(c, { index: handshake.index, theirs: message.from, keys: finished.keys, stream, second: null });
      openStream(c, stream);
      c.ackDue = true; // the peer takes the new session when we have used it, see `newSecure`
      for (const part of c.parts.filter(isInHandshake)) part.dueAt = now + timeout(c.relayRtt, 1);
    }
    onSealed(message.sealed, origin);
    if (entry) settle(entry.conversation);
  }

  /** What waited for a session. */
  function settle(c: Conversation): void {
    if (c.ackDue && sealing(c)) acknowledge(c, null);
    if (c.attempt?.plan && c.attempt.tellAt === Infinity && sealing(c)) c.attempt.tellAt = now;
    pump(c);
  }

  /** Somebody who passes for the peer does not know what it must know. */
  function distrust(c: Conversation): void {
    c.untrusted = true;
    if (c.warnedOf === c.peer!.nonce || !spend(warnings, WARNINGS, { now })) return;
    c.warnedOf = c.peer!.nonce;
    const message =
      `"${c.name}" tries to talk to us but holds other keys or another secret: compare your --secret-file`;
    emit({ event: "error", code: "untrusted", message, notice: true });
  }

  function sealed(c: Conversation, frame: Peer, secure = sealing(c)): Uint8Array | null {
    if (!secure) return null;
    const data = sealPeer(frame, { index: secure.theirs, counter: secure.sent++, key: secure.keys.send });
    const { theirs: to, index: from, second: noise } = secure;
    return noise ? encodeHandshake({ type: "P2PSECOND", to, from, noise, sealed: data }) : data;
  }

  function onSealed(data: Uint8Array, origin: Origin): void {
    const header = peerHeader(data);
    const entry = header && byIndex.get(header.index);
    if (!entry?.secure) return;
    const { conversation, secure } = entry;
    if ((verified.get(conversation.name) ?? secure.peerKey) !== secure.peerKey) return;
    const frame = openPeer(data, secure.keys.receive);
    if (!frame || !accept(secure.window, header!.counter)) return;
    if (secure.second) conversation.secure = secure;
    secure.second = null;
    onFrame(conversation, { frame, origin, stream: secure.stream });
    settle(conversation);
  }

  function onFrame(c: Conversation, { frame, origin, stream }: { frame: Peer; origin: Origin; stream: string }): void {
    if (frame.type === "P2PMESSAGE") onPart(c, frame, { origin, stream });
    else if (frame.type === "P2PMESSAGEACK") onAck(c, frame, origin);
    else if (frame.type === "P2PTRASH") onPunch(c, frame.probe, origin);
    else if (frame.type === "P2PPLAN") onPlan(c, frame);
    else onEcho(c, frame.probe, origin);
  }

  // -- paths: introduction, punching, and what becomes of a hole

  /** Has the server pass bytes on; `call`: and introduce us, which is asked for again should the answer be lost. */
  function passOn(c: Conversation, body: Uint8Array, call: boolean): void {
    tell({ type: "P2PTRANS", to: c.name, nonce: c.peer?.nonce ?? NO_ID, call: Number(call), body });
    if (!call) return;
    c.rounds++;
    c.askAt = Infinity;
    if (!direct || isMirror(c)) return;
    if (c.rounds < MAX_ROUNDS) c.askAt = now + timeout(serverRtt, c.rounds);
    else if (!c.best && !c.punching && c.retryAt === Infinity) retryLater(c);
  }

  function retryLater(c: Conversation): void {
    c.retryAt = now + RETRY_DIRECT_MS[Math.min(c.retries++, RETRY_DIRECT_MS.length - 1)]!;
  }

  /**
   * Passes bytes on to the peer over the server; `calls`: and asks for an introduction, up to five times, or as long as
   * nothing comes back: the peer may have no idea any more who we are.
   */
  function relay(c: Conversation, body: Uint8Array, { calls }: { calls: boolean }): void {
    if (!session) return;
    const isForgotten = (oldest(c)?.tries ?? 0) > FORGOTTEN_AFTER;
    passOn(c, body, calls && !c.best && (isForgotten || (c.rounds < MAX_ROUNDS && (direct || !sealing(c)))));
  }

  /** Sends the same sealed bytes every way given; the peer takes the first copy. */
  function transmit(
    c: Conversation,
    frame: Peer,
    routes: (Path | null)[],
    { calls = false, secure = sealing(c) } = {},
  ): boolean {
    const data = sealed(c, frame, secure);
    if (!data) return false;
    for (const path of routes) {
      if (path) send(path.socket, path.endpoint, data);
      else relay(c, data, { calls });
    }
    return true;
  }

  const routes = (c: Conversation): (Path | null)[] =>
    !c.best ? [null] : c.best.state === "suspect" ? [c.best, null] : [c.best];

  /** Looks for a path as if for the first time. */
  function beginAnew(c: Conversation): void {
    c.calledAt = now;
    c.rounds = c.retries = 0;
  }

  /** Something has changed: ask for a new introduction, and be quick with retries again. */
  function callAgain(c: Conversation): void {
    beginAnew(c);
    askForIntroduction(c);
  }

  function askForIntroduction(c: Conversation): void {
    if (!session || !direct || isMirror(c)) return;
    const body = !sealing(c) && c.opening?.handshake ? firstMessage(c, 0) : NO_BYTES;
    passOn(c, body, true);
  }

  function onIntroduction(peer: Introduced): void {
    const c = conversations.get(peer.name);
    if (!c || !spend(c.introductions, INTRODUCTIONS_PER_PEER, { now })) return;
    const isCurrent = c.peer?.nonce === peer.nonce;
    if (!renew(c, peer)) return;
    c.lastError = null;
    c.askAt = Infinity;
    // What we sent was for another login, or empty: the peer could do nothing with it, so it does not punch yet.
    if (isCurrent && (c.opening?.handshake || sealing(c))) startPunching(c);
    else resendAll(c);
    resendLate(c);
  }

  function onCall(peer: Introduced, body: Uint8Array): void {
    const c = conversationWith(peer.name === name ? "" : peer.name);
    if (!c) return;
    if (!c.best && !c.punching) c.calledAt = now;
    if (!renew(c, peer)) return;
    c.lastError = null;
    c.askAt = Infinity;
    if (body.length > 0) onPeerDatagram(body, null, c);
    // Sealed for a session that we have not, or no longer; or a call for punches, which we cannot seal any more.
    if ((body.length > 0 || c.secure) && !sealing(c) && !c.untrusted) open(c);
    if (!spend(c.introductions, INTRODUCTIONS_PER_PEER, { now })) return;
    if (c.opening?.handshake || sealing(c)) startPunching(c);
    resendLate(c);
  }

  function startPunching(c: Conversation): void {
    if (!direct || isMirror(c)) return;
    c.punching = { from: now + c.peer!.punchAfterMs, step: 0 };
    c.retryAt = Infinity;
    wakePunching(c);
    const isPermissive = ["EIF", "ADF"].includes(isSymmetric(nat) ? c.peer!.nat.filtering : nat.filtering);
    if (c.best || !(isSymmetric(nat) || isSymmetric(c.peer!.nat)) || isPermissive) return;
    const { attempt } = c;
    if (!attempt) return startAttempt(c, 0);
    const fits = attempt.symmetric === isSymmetric(nat) && attempt.peerSymmetric === isSymmetric(c.peer!.nat);
    if (attempt.number > 1 || fits) return;
    // Begun before somebody's class of NAT was known: with other sockets, or other targets.
    if (isSymmetric(nat)) startAttempt(c, attempt.number + 1);
    else if (!attempt.spray) startAttempt(c, attempt.number, attempt.theirs);
  }

  function wakePunching(c: Conversation): void {
    while (c.punching && now >= c.punching.from + PUNCH_AT_MS[c.punching.step]!) {
      const best = c.best?.state === "good" ? c.best : null;
      const wanted = c.peer!.candidates.filter((endpoint) =>
        usable(endpoint, session?.public ?? endpoint) && (!best || (kindOf(endpoint) === "lan" && best.kind !== "lan"))
      );
      for (const endpoint of wanted) {
        const path = pathTo(c, { socket: 0, from: endpoint });
        if (path) probe(c, path);
      }
      if (now >= c.punching.from + FRESH_SOCKETS_AFTER_MS && !c.attempt && !best) startAttempt(c, 1);
      if (c.punching.step === 0 && session) tell({ type: "PUNCHED", peer: c.name });
      if (++c.punching.step < PUNCH_AT_MS.length && wanted.length > 0) continue;
      c.punching = null;
      if (!c.best) retryLater(c);
    }
  }

  const pathOver = (c: Conversation, origin: Origin) =>
    c.paths.find(({ socket, endpoint }) => socket === origin?.socket && endpoint === origin.from) ?? null;

  /** The path to an endpoint; null if the peer has no business there. */
  function pathTo(c: Conversation, origin: Origin & object): Path | null {
    const found = pathOver(c, origin);
    if (found) return found;
    const host = hostOf(origin.from);
    // Only where the server has seen the peer, or on our own LAN: nobody can have us send to a third party elsewhere.
    if (!c.peer?.candidates.some((candidate) => hostOf(candidate) === host)) return null;
    if (c.paths.length >= MAX_PATHS) {
      const spare = c.paths.find(({ state }) => state === "trying");
      dropPaths(c, (path) => path !== spare);
    }
    const path: Path = {
      endpoint: origin.from,
      socket: origin.socket,
      kind: kindOf(origin.from),
      state: "trying",
      rtt: newEstimator(),
      waitingSince: Infinity,
      answeredAt: now,
      bornAt: now,
      probeAt: Infinity,
      fastProbes: 0,
    };
    c.paths.push(path);
    return path;
  }

  /** Forgets the paths that are not kept, and closes those of their sockets that nothing else needs. */
  function dropPaths(c: Conversation, isKept: (path: Path) => boolean): void {
    const gone = c.paths.filter((path) => !isKept(path));
    c.paths = c.paths.filter(isKept);
    const needed = [...c.paths, ...c.attempt?.sockets ?? []].map(({ socket }) => socket);
    for (const { socket } of gone) if (socket !== 0 && !needed.includes(socket)) closeSocket(socket);
  }

  function newProbe(c: Conversation, path: Path | null, kind: "punch" | "ping" | "swept" = "punch"): number {
    const id = randomNumber(32);
    if (c.probes.size >= MAX_PROBES) c.probes.delete(c.probes.keys().next().value!);
    c.probes.set(id, { path, at: now, kind });
    return id;
  }

  /** A punch, which asks: did this reach you? Until the peer has answered the handshake, a copy of its first message. */
  const punch = (c: Conversation, probe: number) =>
    sealed(c, { type: "P2PTRASH", probe }) ?? (c.opening?.handshake ? firstMessage(c, probe) : null);

  /** Punches on a path; one in use waits for the echo, even if there is no session any more to seal the punch with. */
  function probe(c: Conversation, path: Path): void {
    if (path.state === "trying" && !mayTry(c)) return;
    const data = punch(c, newProbe(c, path));
    if (data) send(path.socket, path.endpoint, data);
    if (path.state !== "trying") path.waitingSince = Math.min(path.waitingSince, now);
  }

  const mayPunch = () => spend(punches, PUNCHES, { now });
  /** On a path that is no more than an address which the peer, or the server, has named. */
  const mayTry = (c: Conversation) => spend(c.punches, PUNCHES_PER_PEER, { now }) && mayPunch();

  function onPunch(c: Conversation, id: number, origin: Origin): void {
    const path = origin && direct ? pathTo(c, origin) : null;
    if (origin && !path) return;
    if (path?.state === "trying" && !mayTry(c)) return;
    if (!transmit(c, { type: "P2PECHO", probe: id }, [path])) return open(c); // one of us has logged in anew
    if (path?.state === "trying") probe(c, path); // it passed inwards, now ours will pass outwards
  }

  function onEcho(c: Conversation, id: number, origin: Origin): void {
    const asked = c.probes.get(id);
    if (!asked) return;
    const path = asked.kind === "swept" && origin ? pathTo(c, origin) : asked.path;
    if (path ? path.endpoint !== origin?.from || path.socket !== origin.socket : origin) return;
    if (asked.kind !== "swept") c.probes.delete(id);
    const rttMs = now - asked.at;
    sample(path?.rtt ?? c.relayRtt, rttMs);
    if (asked.kind === "ping" && c.ping?.waiting === id) onPong(c, { path, rttMs });
    if (path) answered(c, path);
  }

  /** Something sent on a path has been answered over it: it works in both directions. */
  function answered(c: Conversation, path: Path): void {
    path.waitingSince = Infinity;
    path.answeredAt = now;
    const { best } = c;
    const better = !best || best.state !== "good" || (path.kind === "lan" && best.kind !== "lan") ||
      (path.kind === best.kind && path.rtt.srtt! < best.rtt.srtt! * QUICKER_FACTOR - QUICKER_MS) ||
      (isRenewing(c) && path.bornAt >= c.attempt!.startedAt);
    if (path !== best) return better ? use(c, path) : undefined;
    path.state = "good";
    path.probeAt = nextProbeAt(c);
  }

  function use(c: Conversation, path: Path | null): void {
    const age = c.best?.state === "suspect" ? now - c.best.bornAt : 0;
    if (age > RENEWED_MS) c.lifetimes = [...c.lifetimes.slice(-1), age];
    if (c.best) c.best.state = "trying";
    c.best = path;
    if (path) {
      if (c.attempt?.spray) sprayedAt = -Infinity; // it is over
      path.state = "good";
      c.retryAt = c.askAt = Infinity;
      c.retries = c.rounds = 0;
      path.probeAt = nextProbeAt(c);
      resendLate(c);
    }
    // Some carriers end a mapping at a certain age, whatever the traffic: then move before that, not after.
    const [one = Infinity, other = 0] = c.lifetimes, shorter = Math.min(one, other), longer = Math.max(one, other);
    const isAbsolute = longer < ABSOLUTE_LIFETIME_MS && shorter > longer * SAME_LIFETIME;
    c.renewAt = path && isAbsolute ? now + shorter * RENEW_AT : Infinity;
    tellPath(c);
  }

  function tellPath(c: Conversation): void {
    const path = c.best;
    const rttMs = path ? path.rtt.srtt : c.relayRtt.srtt;
    emit({
      event: "path",
      peer: c.name,
      path: path?.kind ?? "relay",
      address: path?.endpoint ?? session?.server ?? servers[0]!,
      rttMs: rttMs === null ? null : tenths(rttMs),
      ms: tenths(now - c.calledAt),
    });
  }

  const nextProbeAt = (c: Conversation) =>
    !isWarm(c) ? Infinity : now + (now - c.talkedAt < ACTIVE_MS ? ACTIVE_PROBE_MS : spread(WARM_PROBE_MS));

  function suspect(c: Conversation, path: Path): void {
    path.state = "suspect";
    path.fastProbes = 0;
    path.probeAt = now;
    if (session && !login && !session.asked) keepalive(); // re-opens the way to the server, should the NAT have forgotten
    for (const part of c.parts.filter(isInFlight)) sendPart(c, part);
  }

  function wakePath(c: Conversation, path: Path): void {
    if (path.state === "good" && now >= path.waitingSince + patience(path)) suspect(c, path);
    if (now < path.probeAt) return;
    if (path.state === "good") {
      probe(c, path);
      path.probeAt = nextProbeAt(c);
    } else if (path.fastProbes < FAST_PROBES) {
      probe(c, path);
      if (++path.fastProbes === FAST_PROBES_BEFORE_CALL) askForIntroduction(c);
      path.probeAt = now + (path.fastProbes < FAST_PROBES ? FAST_PROBE_MS : patience(path));
    } else {
      c.paths = c.paths.filter(({ socket, endpoint }) => socket !== path.socket || endpoint !== path.endpoint);
      if (path.socket !== 0) closeSocket(path.socket);
      use(c, null);
      callAgain(c);
      resendAll(c);
    }
  }

  // -- knowing our NAT: as RFC 5780 has it, but nothing here can spoil a mapping that a punch will need

  function openSocket(then: (socket: number, port: number) => void): void {
    const socket = sockets++;
    openSockets.add(socket);
    opening.set(socket, (port) => {
      if (port === 0) openSockets.delete(socket);
      then(socket, port);
    });
    effects.push({ kind: "open", socket });
  }

  function closeSocket(socket: number): void {
    if (openSockets.delete(socket)) effects.push({ kind: "close", socket });
  }

  /** Asks a STUN server how it sees one of our sockets; null after some tries: nothing came back. */
  function ask(question: Question, done: (answer: Stun | null) => void): void {
    const transaction = STUN_COOKIE + hex(random(12));
    const data = encodeStunRequest({ ...question, transaction });
    queries.set(transaction, { ...question, data, tries: 0, dueAt: now, done });
    wakeQueries();
  }

  function wakeQueries(): void {
    for (const [transaction, query] of queries) {
      if (now < query.dueAt) continue;
      if (query.tries++ < QUERY_TRIES) {
        query.dueAt = now + QUERY_MS;
        send(query.socket, query.to, query.data);
      } else {
        queries.delete(transaction);
        query.done(null);
      }
    }
  }

  function onStun(data: Uint8Array): void {
    const stun = decodeStun(data);
    const query = stun && queries.get(stun.transaction);
    if (!query) return;
    if (stun.kind === "request") hairpin = true; // our own question came back to us by our public address
    else {
      queries.delete(stun.transaction);
      query.done(stun.kind === "response" ? stun : null);
    }
  }

  /**
   * Finds out our class of NAT: the mapping and the allocation in one round trip, the filtering when silence proves it.
   * One discovery at a time: if our endpoint changes meanwhile, another one follows.
   */
  function discover(): void {
    if (!session || isIPv6(session.server)) return;
    if (discovery) return void (discovery.again = true);
    const { server, public: seen, secondPort } = session;
    const facts: Facts = {
      isNone: addresses.includes(hostOf(seen)) || scopeOf(hostOf(seen)) === "loopback",
      samples: [],
    };
    const mine = discovery = { again: false };
    hairpin = null;
    // Answers that are awaited, and those of them without which half a class would mislead.
    let awaited = 1 + SAMPLES, needed = awaited;
    const settle = (isNeeded: boolean) => {
      awaited--;
      if (isNeeded) needed--;
      if (needed === 0 && !mine.again) believe(facts, seen);
      if (awaited > 0) return;
      for (const { socket } of facts.samples) closeSocket(socket);
      discovery = null;
      if (mine.again) discover();
      if (!discovery) { for (const tell of waitingForNat.splice(0)) tell(); }
    };
    const askFor = (question: Question, note: (answer: Stun | null) => void, isNeeded = false) =>
      ask(question, (answer) => {
        note(answer);
        settle(isNeeded);
      });
    const find = (question: Question, note: (answer: Stun | null) => void) => {
      awaited++;
      askFor(question, note);
    };
    const elsewhere = (to: Endpoint) => find({ socket: 0, to }, (answer) => facts.elsewhere = answer?.mapped);
    askFor({ socket: 0, to: formatEndpoint(hostOf(server), secondPort) }, (answer) => {
      facts.secondPort = answer?.mapped;
      if (answer?.other) elsewhere(answer.other);
    }, true);
    if (options.observer) elsewhere(options.observer);
    find({ socket: 0, to: server, changePort: true }, (answer) => facts.thirdPort = answer !== null);
    for (let i = 0; i < SAMPLES; i++) {
      openSocket((socket, inside) => {
        const sample = { socket, inside, outside: 0 };
        facts.samples.push(sample); // in the order of the questions: answers overtake each other
        askFor({ socket, to: server }, (answer) => {
          const outside = answer?.mapped;
          if (sample === facts.samples[0] && answer?.other) { // asked by a socket that has not written there, as socket 0 has
            find({ socket, to: server, changeIp: true, changePort: true }, (answer) => {
              facts.otherAddress = answer !== null;
            });
          }
          if (!outside) return;
          sample.outside = parseEndpoint(outside)!.port;
          if (facts.samples.length < SAMPLES || facts.samples.some(({ outside }) => outside === 0)) return;
          hairpin ??= false;
          // Both ways at once, since the mappings filter: a hairpin is a hole punched towards oneself.
          find({ socket, to: seen }, () => {});
          find({ socket: 0, to: outside }, () => {});
        }, true);
      });
    }
  }

  /** What the facts say of our NAT. If that changes what can be tried, calls under way begin anew, see `onAlive`. */
  function believe(facts: Facts, seen: Endpoint): void {
    const found = classOf(facts, seen);
    const outside = facts.samples.map((sample) => sample.outside).filter((port) => port > 0);
    stride = stepOf(facts.samples) || 1;
    block = [
      Math.max(LOWEST_PORT, Math.max(...outside) - BLOCK_GUESS),
      Math.min(65_535, Math.min(...outside) + BLOCK_GUESS),
    ];
    if (JSON.stringify(found) === JSON.stringify(nat)) return;
    isNews ||= isSymmetric(found) !== isSymmetric(nat) || (isSymmetric(found) && found.allocation !== nat.allocation);
    nat = found;
    if (session && !login) keepalive();
  }

  function reportNat(): void {
    emit({ event: "nat", ...nat, public: session?.public ?? "", hairpin, udp: session !== null });
  }

  // -- harder NATs: attempts with more sockets, predicted ports and sprays
  //
  //     ours \ theirs     EIM                        symmetric, foreseeable        symmetric, random
  //     EIM               a fresh socket each:       from one socket to all that   spray: to 2,048 ports of theirs,
  //                       their NATs may have been   they tell: one is right       of which 256 are open to us
  //                       spoilt by early packets
  //     symmetric,        open a few, tell which:    the i-th packet of each to    none: the odds are quadratic
  //     foreseeable       the first try is to hit    the i-th port of the other
  //     symmetric,        open 256, so that every    none                          none
  //     random            250th port is right
  //
  // A symmetric side opens its NAT with packets that die before they arrive: a router with an open INPUT chain would
  // take them for new flows, and lose the very ports that it is about to use.

  /** Begins attempt `number`: one cell of the table, as the other side plays it too; its plan, or ours, sees to that. */
  function startAttempt(c: Conversation, number: number, theirs: Attempt["theirs"] = null): void {
    const peerNat = c.peer!.nat;
    const isFirst = isLower(keys.public, c.peer!.key);
    const symmetric = isTakenForSymmetric(nat, peerNat, { number, isFirst });
    const peerSymmetric = isTakenForSymmetric(peerNat, nat, { number, isFirst: !isFirst });
    const random = symmetric && !isPredictable(nat), peerRandom = peerSymmetric && !isPredictable(peerNat);
    const isHopeless = symmetric && peerSymmetric && (random || peerRandom); // the odds are quadratic
    if (c.attempt) endAttempt(c);
    if (!spend(c.attempts, ATTEMPTS_PER_PEER, { now })) return;
    // Behind our own NAT, which does not hairpin: nothing that is sent to its public address arrives.
    const target = publicOf(c), isBehindOurs = target && session && hostOf(target) === hostOf(session.public);
    if (isBehindOurs && hairpin === false) return;
    if (number === RENEWAL && (isRandom(nat) || isRandom(peerNat))) return; // a spray each minute is no way to live
    if (isHopeless || (number > MAX_ATTEMPT && number !== RENEWAL) || isMirror(c)) return;
    const count = random ? SPRAY_SOCKETS : symmetric ? (peerSymmetric ? GUESSES : FEW) : peerSymmetric ? 0 : 1;
    if (openSockets.size + count > MAX_SOCKETS) return;
    const attempt: Attempt = c.attempt = {
      number,
      startedAt: now,
      endAt: now + (random || peerRandom ? SPRAY_ATTEMPT_MS : ATTEMPT_MS),
      symmetric,
      peerSymmetric,
      random,
      careful: random && c.retries === 0,
      sockets: [],
      plan: null,
      theirs,
      tellAt: Infinity,
      volley: 0,
      volleyAt: Infinity,
      spray: null,
    };
    aim(c);
    if (count === 0) plan(c, attempt);
    let left = count;
    for (let i = 0; i < count; i++) {
      openSocket((socket, port) => {
        if (c.attempt !== attempt) return closeSocket(socket);
        if (port > 0) attempt.sockets.push({ socket, port });
        if (--left === 0) plan(c, attempt);
      });
    }
  }

  /** Foretells the outside ports of our next packets to the peer, each from a socket that has sent nothing yet. */
  function plan(c: Conversation, attempt: Attempt): void {
    if (!session) return;
    const { server } = session;
    const announce = (ports: number[], spray = 0) => {
      if (c.attempt !== attempt) return;
      attempt.plan = { type: "P2PPLAN", attempt: attempt.number, spray, ports };
      attempt.tellAt = now;
      aim(c);
      wakeAttempt(c);
    };
    const inside = attempt.sockets.map(({ port }) => port);
    const outside = (socket: number, then: (port: number) => void) =>
      ask({ socket, to: server }, (answer) => answer?.mapped && then(parseEndpoint(answer.mapped)!.port));
    if (inside.length === 0) {
      // Nothing to foretell; but the peer, who has, must hear that the path is to be renewed.
      if (attempt.number === RENEWAL) announce([parseEndpoint(session.public)!.port]);
      return;
    }
    if (!attempt.symmetric) outside(attempt.sockets[0]!.socket, (port) => announce([port]));
    else if (attempt.random) announce(nat.allocation === "block" ? block : [], 1);
    else if (nat.allocation === "preserving") announce(inside);
    else {
      // A socket that is good for nothing else shows the counter as it stands now.
      openSocket((socket) =>
        ask({ socket, to: server }, (answer) => {
          closeSocket(socket);
          const last = answer?.mapped && parseEndpoint(answer.mapped)!.port;
          if (!last) return;
          const next = Array.from({ length: MAX_PLANNED_PORTS }, (_, i) => last + (i + 1) * stride);
          announce(next.filter((port) => port > 0 && port < 65_536));
        })
      );
    }
  }

  function onPlan(c: Conversation, theirs: Peer & { type: "P2PPLAN" }): void {
    const isWanted = c.best?.state !== "good" || (theirs.attempt === RENEWAL && now - c.best.bornAt > RENEWED_MS);
    if (!direct || !isWanted) return;
    if (!c.attempt || theirs.attempt > c.attempt.number) startAttempt(c, theirs.attempt);
    if (!c.attempt || c.attempt.theirs || theirs.attempt !== c.attempt.number) return;
    c.attempt.theirs = theirs;
    aim(c);
    wakeAttempt(c);
  }

  /** We alone are symmetric: our packets open our NAT to one port of the peer, which finds out where. */
  const isOpener = (attempt: Attempt) => attempt.symmetric && !attempt.peerSymmetric;

  /** Whether both sides know where to send; if so, now. */
  function aim(c: Conversation): void {
    const attempt = c.attempt!;
    const isReady = attempt.plan !== null || (!attempt.symmetric && attempt.peerSymmetric);
    const knowsWhere = attempt.theirs !== null || isOpener(attempt);
    if (isReady && knowsWhere && attempt.volleyAt === Infinity && attempt.volley === 0) attempt.volleyAt = now;
  }

  /** Where the server sees the peer, in IPv4. */
  const publicOf = (c: Conversation) => c.peer!.candidates.findLast((endpoint) => !isIPv6(endpoint));

  function volley(c: Conversation): void {
    const attempt = c.attempt!, target = publicOf(c);
    if (!target || isSettled(c)) return;
    const host = hostOf(target), ports = attempt.theirs?.ports ?? [];
    const both = attempt.symmetric && attempt.peerSymmetric, opens = isOpener(attempt);
    if (attempt.theirs?.spray && !attempt.symmetric) {
      if (attempt.spray || now - sprayedAt < SPRAY_INTERVAL_MS) return; // one at a time, on this host
      sprayedAt = now;
      attempt.spray = {
        next: 0,
        at: now - SPRAY_AHEAD_MS,
        first: randomNumber(16),
        stride: coprime(randomNumber(16)),
        block: ports,
      };
      attempt.endAt = now + SPRAY_ATTEMPT_MS;
      return;
    }
    const guess = nat.allocation === "preserving" || isLower(keys.public, c.peer!.key);
    const sweep = newProbe(c, null, "swept");
    for (const [i, { socket }] of (attempt.sockets.length > 0 ? attempt.sockets : [{ socket: 0 }]).entries()) {
      // Against another counter: ours may be off by foreign flows, hence one side guesses how many there were.
      const skip = c.peer!.nat.allocation === "sequential" && guess ? i % FOREIGN_FLOWS : 0;
      const to = both ? ports.slice(i + skip, i + skip + 1) : opens ? [ports[0] ?? parseEndpoint(target)!.port] : ports;
      const ttl = opens && (attempt.volley === 0 || attempt.careful) ? OPENER_TTL : undefined;
      for (const port of to) sweepTo(c, sweep, { socket, to: formatEndpoint(host, port), ttl });
    }
  }

  function sweepTo(
    c: Conversation,
    probe: number,
    { socket, to, ttl }: { socket: number; to: Endpoint; ttl?: number | undefined },
  ): boolean {
    if (!mayPunch()) return false;
    const data = punch(c, probe);
    if (data) send(socket, to, data, ttl);
    return true;
  }

  /** A burst of the spray: ports that have not been tried, those of the peer's block first. */
  function spray(c: Conversation): void {
    const spray = c.attempt!.spray!, host = hostOf(publicOf(c)!);
    const [low = 0, high = -1] = spray.block, span = Math.max(0, high - low + 1);
    const sweep = newProbe(c, null, "swept");
    const isFirstHalf = spray.next < SPRAY_PORTS / 2;
    for (let sent = 0; sent < SPRAY_BURST; sent++, spray.next++) {
      const i = spray.next;
      const port = i < span ? low + i : LOWEST_PORT + (spray.first + i * spray.stride) % PORTS;
      if (!sweepTo(c, sweep, { socket: 0, to: formatEndpoint(host, port) })) break;
    }
    spray.at += isFirstHalf && spray.next >= SPRAY_PORTS / 2 ? SPRAY_PAUSE_MS : SPRAY_BURST_MS;
  }

  function wakeAttempt(c: Conversation): void {
    const { attempt } = c;
    if (!attempt) return;
    if (attempt.plan && now >= attempt.tellAt) {
      attempt.tellAt = transmit(c, attempt.plan, c.best ? [c.best, null] : [null]) ? now + TELL_PLAN_MS : Infinity;
    }
    while (now >= attempt.volleyAt) {
      volley(c);
      const times = !isOpener(attempt) ? VOLLEYS_MS : attempt.random ? SPRAY_VOLLEYS_MS : OPENER_VOLLEYS_MS;
      attempt.volleyAt += (times[attempt.volley + 1] ?? Infinity) - times[attempt.volley]!;
      attempt.volley++;
    }
    while (now >= burstAt(c)) spray(c);
    if (now < attempt.endAt) return;
    const again = !c.best && attempt.number < RENEWAL && !isRandom(nat) && !isRandom(c.peer!.nat);
    if (again) startAttempt(c, attempt.number + 1);
    else endAttempt(c);
  }

  const isRenewing = (c: Conversation) => c.attempt?.number === RENEWAL && c.best!.bornAt < c.attempt.startedAt;
  /** Nothing is left for an attempt to do. */
  const isSettled = (c: Conversation) => c.best?.state === "good" && !isRenewing(c);

  /** When the next burst of a spray leaves. */
  const burstAt = (c: Conversation, spray = c.attempt?.spray) =>
    spray && spray.next < SPRAY_PORTS && !isSettled(c) ? spray.at : Infinity;

  const attemptWakeAt = (c: Conversation, { attempt } = c) =>
    attempt ? Math.min(attempt.endAt, attempt.volleyAt, attempt.tellAt, burstAt(c)) : Infinity;

  /** Closes the sockets that nothing came through. */
  function endAttempt(c: Conversation): void {
    const isKept = ({ socket }: { socket: number }) => socket === 0 || socket === c.best?.socket;
    for (const one of [...c.attempt!.sockets, ...c.paths]) if (!isKept(one)) closeSocket(one.socket);
    c.paths = c.paths.filter(isKept);
    c.attempt = null;
  }

  // -- messages: split, sent, acknowledged, put together again

  function enqueue(to: string, text: string): void {
    const bytes = utf8.encode(text), c = conversationTo(to);
    const refuse = (reason: Reason) =>
      emit({ event: "sent", to, id: `${hex(random(4))}-0`, ok: false, ms: 0, path: "relay", reason });
    if (bytes.length === 0) return refuse("empty");
    if (bytes.length > MAX_MESSAGE_BYTES) return refuse("too-long");
    if (!c) return refuse("unknown");
    if (c.untrusted) return refuse("untrusted");
    if (c.parts.length === 0) c.progressAt = now;
    if (!c.best && !c.punching && (c.retryAt === Infinity || !sealing(c))) beginAnew(c);
    touch(c);
    const count = Math.ceil(bytes.length / MAX_PART_BYTES);
    const message: Message = { id: `${c.stream.slice(0, 8)}-${c.nextSeq + count - 1}`, startedAt: now };
    for (let i = 0; i < count; i++) {
      const part = bytes.subarray(i * MAX_PART_BYTES, (i + 1) * MAX_PART_BYTES), left = count - 1 - i;
      const unsent = { tries: 0, sentAt: 0, dueAt: 0, over: null, came: null };
      c.parts.push({ seq: c.nextSeq++, left, bytes: part, message, ...unsent });
    }
    pump(c);
  }

  /** A message goes either way: the path is checked all the time from here on. */
  function touch(c: Conversation): void {
    const { best } = c;
    c.talkedAt = now;
    if (!best && session) session.keepaliveAt = Math.min(session.keepaliveAt, now + RELAY_KEEPALIVE_MS);
    if (!best) return;
    if (now - best.answeredAt > STALE_PATH_MS && best.state === "good") suspect(c, best);
    best.probeAt = Math.min(best.probeAt, now + ACTIVE_PROBE_MS);
  }

  /** The part that all others wait for. */
  const oldest = (c: Conversation) => c.parts.find(({ came }) => came === null);

  function asMessage(c: Conversation, { seq, left, bytes }: Part): Peer {
    return { type: "P2PMESSAGE", seq, base: c.parts[0]!.seq, left, part: bytes };
  }

  function mark(part: Part, { over, dueAt }: { over: Path | null; dueAt: number }): void {
    part.tries++;
    part.sentAt = now;
    part.over = over;
    part.dueAt = dueAt;
  }

  const isInFlight = ({ tries, came }: Part) => tries > 0 && came === null;
  const isInHandshake = ({ dueAt, came }: Part) => dueAt === Infinity && came === null;

  /** The peer does not have any more what it has acknowledged: sent again. */
  function takeBack(parts: Part[], dueAt = now): void {
    for (const part of parts) if (part.came) Object.assign(part, { came: null, dueAt });
  }

  function sendPart(c: Conversation, part: Part): void {
    const again = part.tries > 0;
    const over = again && c.best ? [c.best, null] : routes(c);
    // The one that all others wait for: where so much is lost, copies are what gets it through.
    const copies = part === oldest(c) ? Math.min(MAX_COPIES, Math.max(1, part.tries)) : 1;
    for (let i = 0; i < copies; i++) if (!transmit(c, asMessage(c, part), over, { calls: true })) return;
    const estimator = c.best?.rtt ?? c.relayRtt;
    const isTail = part.tries === 0 && part === c.parts.at(-1);
    const wait = isTail ? tailTimeout(estimator) : timeout(estimator, Math.max(1, part.tries));
    mark(part, { over: c.best, dueAt: now + wait });
    if (c.best) c.best.waitingSince = Math.min(c.best.waitingSince, now);
  }

  /** Sends what may be sent now: what is due again, and what is new as far as the window allows. */
  function pump(c: Conversation): void {
    if (c.parts.length === 0 || !session) return;
    if (!sealing(c) || c.secure!.sent > REKEY_AFTER) open(c);
    if (!sealing(c)) return;
    const base = oldest(c)?.seq ?? 0;
    let inFlight = c.parts.filter(isInFlight).length, late = false;
    for (const part of c.parts) {
      if (part.tries === 0) {
        if (inFlight >= c.window || part.seq >= base + WINDOW_MAX) break;
        inFlight++;
        sendPart(c, part);
      } else if (now >= part.dueAt) {
        late = true;
        sendPart(c, part);
      }
    }
    if (late) c.window = Math.max(WINDOW_MIN, c.window / 2);
  }

  /** Whether anything waits for a session with the peer. */
  const isNeeded = (c: Conversation) =>
    c.parts.length > 0 || c.ping !== null || (c.ackDue && c.opening!.tries < MAX_ROUNDS);

  /** The peer can be reached again: no need to wait out a time-out that has grown meanwhile. */
  function resendLate(c: Conversation, sentBefore = now - (c.relayRtt.srtt ?? RTO_FIRST_MS)): void {
    for (const part of c.parts) {
      if (part.sentAt < sentBefore && part.dueAt !== Infinity) part.dueAt = Math.min(part.dueAt, now);
    }
    pump(c);
  }

  function resendAll(c: Conversation): void {
    if (!sealing(c) && c.opening) sendOpening(c);
    else if (!sealing(c)) open(c);
    resendLate(c, Infinity);
  }

  function onAck(c: Conversation, ack: Peer & { type: "P2PMESSAGEACK" }, origin: Origin): void {
    const path = pathOver(c, origin);
    if (path && path.state !== "trying") answered(c, path);
    const cameOf = ({ seq }: Part) => stateOf(ack.states, seq - ack.from);
    const news = c.parts.filter((part) => isInFlight(part) && (part.seq < ack.next || cameOf(part) !== null));
    if (news.length > 0) {
      c.progressAt = now;
      c.lastError = null;
      c.window = Math.min(WINDOW_MAX, c.window + news.length / 4);
    }
    const margin = REORDERING * ((path ? path.rtt : c.relayRtt).srtt ?? RTO_FIRST_MS);
    const newest = Math.max(...news.map(({ sentAt }) => sentAt)) - margin;
    for (const part of news) {
      const { tries, sentAt, over } = part;
      if (tries === 1 && over === path) sample(over?.rtt ?? c.relayRtt, now - sentAt); // Karn's algorithm
      part.came = cameOf(part) ?? over?.kind ?? "relay";
      part.dueAt = Infinity;
    }
    for (const part of c.parts.filter(isInFlight)) {
      if (part.sentAt < newest) part.dueAt = Math.min(part.dueAt, now);
    }
    // What has not been shown yet is kept, even if it is there: the parts of a message that is not whole, and what is
    // behind a gap. A new run of the peer needs it, and so does the peer itself, with a new base, if the gap is given up.
    for (let last; (last = c.parts.find(({ left }) => left === 0)) && last.came && last.seq < ack.next;) {
      c.parts.splice(0, c.parts.indexOf(last) + 1);
      const { id, startedAt } = last.message;
      emit({ event: "sent", to: c.name, id, ok: true, ms: tenths(now - startedAt), path: last.came });
    }
    // What all else waits for is there, and yet not counted: what came before was given up, or the peer has forgotten
    // it, and then all that it does not name any more.
    const [head] = c.parts;
    if (!head?.came || head.seq < ack.next) return;
    const gone = c.parts.filter((part) => part === head || cameOf(part) === null);
    takeBack(gone, now + timeout(c.best?.rtt ?? c.relayRtt, 1));
  }

  function openStream(c: Conversation, stream: string): void {
    if (c.incoming?.stream === stream) return;
    c.incoming = { stream, next: 0, parts: new Map(), came: new Map(), message: [] };
  }

  function onPart(
    c: Conversation,
    { seq, base, left, part }: Peer & { type: "P2PMESSAGE" },
    { origin, stream }: { origin: Origin; stream: string },
  ): void {
    const { incoming } = c;
    if (!incoming || incoming.stream !== stream || base > seq || part.length > MAX_PART_BYTES) return;
    if (left > 0 && part.length < MAX_PART_BYTES) return; // only the last part of a message may be short
    if (incoming.next < base) skipTo(incoming, base); // what came before has been given up, or was for a run before ours
    if (seq >= incoming.next + 2 * WINDOW_MAX) return;
    if (seq >= incoming.next && !incoming.parts.has(seq)) {
      incoming.parts.set(seq, { left, part });
      incoming.came.set(seq, origin ? kindOf(origin.from) : "relay");
      touch(c);
    }
    deliver(c, incoming);
    acknowledge(c, origin);
  }

  function skipTo(incoming: Incoming, base: number): void {
    incoming.message = [];
    incoming.next = base;
    for (const seq of incoming.parts.keys()) if (seq < base) incoming.parts.delete(seq);
    for (const seq of incoming.came.keys()) if (seq < base - WINDOW_MAX) incoming.came.delete(seq);
  }

  function deliver(c: Conversation, incoming: Incoming): void {
    for (let found; (found = incoming.parts.get(incoming.next)); incoming.next++) {
      incoming.parts.delete(incoming.next);
      incoming.came.delete(incoming.next - WINDOW_MAX);
      incoming.message.push(found.part);
      // All parts but the last are full, see `onPart`.
      const isTooLong = (incoming.message.length - 1) * MAX_PART_BYTES + found.part.length > MAX_MESSAGE_BYTES;
      if (found.left > 0 && !isTooLong) continue;
      if (!isTooLong) {
        emit({
          event: "message",
          from: c.name,
          text: fromUtf8.decode(concat(...incoming.message)),
          path: incoming.came.get(incoming.next)!,
          id: `${incoming.stream.slice(0, 8)}-${incoming.next}`,
        });
      }
      incoming.message = [];
    }
  }

  function acknowledge(c: Conversation, origin: Origin, secure = sealing(c)): void {
    const { next, came } = c.incoming!;
    const from = Math.max(0, next - WINDOW_MAX);
    const path = pathOver(c, origin);
    const frame: Peer = { type: "P2PMESSAGEACK", next, from, states: packStates(came, from) };
    c.ackDue = !transmit(c, frame, path?.state === "good" ? [path] : routes(c), { secure });
    if (c.ackDue) open(c);
  }

  function fail(c: Conversation, message: Message, reason: Reason): void {
    c.parts = c.parts.filter((part) => part.message !== message);
    if (c.parts[0]?.came) c.progressAt = now;
    takeBack(c.parts.slice(0, 1));
    const ms = tenths(now - message.startedAt);
    emit({ event: "sent", to: c.name, id: message.id, ok: false, ms, path: c.best?.kind ?? "relay", reason });
  }

  function failAll(c: Conversation, reason: Reason): void {
    for (const message of new Set(c.parts.map(({ message }) => message))) fail(c, message, reason);
    if (c.ping) {
      c.ping = null;
      emit({ event: "error", code: reason, message: `"${c.name}" is not there` });
    }
  }

  /** The server cannot pass something on. */
  function onError({ reason, about }: Control & { type: "ERROR" }): void {
    const c = conversations.get(about);
    if (!c || (reason !== "unknown" && reason !== "offline")) return;
    // After the server's restart "unknown" only means that the peer is not back yet.
    const isFinal = reason === "offline" || !c.peer ||
      (c.secure === null && c.incoming === null && now - forgottenAt > ALL_BACK_MS);
    c.lastError = reason === "unknown" && c.peer ? "offline" : reason;
    c.askAt = Infinity;
    if (isFinal && !c.best) failAll(c, reason);
  }

  // -- pings

  function wakePing(c: Conversation): void {
    const { ping } = c;
    if (!ping || now < ping.nextAt) return;
    if (!sealing(c)) {
      if (now - ping.since > GIVE_UP_MS) return failAll(c, "timeout");
      open(c);
      ping.nextAt = now + RTO_MIN_MS;
      return;
    }
    if (ping.waiting !== null) {
      ping.lost++;
      onPong(c, { path: c.best, rttMs: null });
      return wakePing(c);
    }
    ping.nextAt = now + PING_LOST_MS;
    ping.waiting = newProbe(c, c.best, "ping");
    transmit(c, { type: "P2PTRASH", probe: ping.waiting }, [c.best]);
  }

  function onPong(c: Conversation, pong: { path: Path | null; rttMs: number | null }): void {
    const ping = c.ping!;
    const rttMs = pong.rttMs === null ? null : tenths(pong.rttMs);
    emit({ event: "ping", peer: c.name, path: pong.path?.kind ?? "relay", rttMs, lost: ping.lost });
    ping.waiting = null;
    ping.nextAt = pong.rttMs === null ? now : now + PING_INTERVAL_MS;
    if (--ping.left === 0) c.ping = null;
  }

  // -- the list of users

  function list(prefix: string, done: (users: User[]) => void): void {
    listings.push({ prefix, after: "", users: [], pages: new Map(), asked: 0, tries: 0, dueAt: now, done });
    wakeListing();
  }

  function wakeListing(): void {
    const listing = listings[0];
    if (!listing || !session || now < listing.dueAt) return;
    if (listing.tries++ >= LIST_TRIES) {
      listings.shift();
      emit({ event: "error", code: "unreachable", message: "The server does not answer with the list of users" });
      return wakeListing();
    }
    listing.pages.clear();
    listing.asked = tell({ type: "GETALLUSER", prefix: listing.prefix, after: listing.after });
    listing.dueAt = now + LIST_RETRY_MS;
  }

  function onUsers(message: Control & { type: "USERS" }): void {
    for (const user of message.users) learn(user);
    const listing = listings[0];
    if (!listing || message.asked !== listing.asked) return;
    listing.pages.set(message.page, message.users);
    // Pages that are here without a gap count, even if a later one was lost.
    for (let page = 0; listing.pages.has(page); page++) {
      const users = listing.pages.get(page)!.filter(({ name }) => listing.after === "" || name > listing.after);
      listing.users.push(...users);
      listing.after = users.at(-1)?.name ?? listing.after;
      if (page < message.last) continue;
      if (message.more && listing.users.length < MAX_LISTED) {
        listing.tries = 0;
        listing.dueAt = now;
      } else {
        listings.shift();
        listing.done(listing.users);
      }
      return wakeListing();
    }
  }

  // -- events in, effects out

  function onControl(message: Control, { from, data }: Datagram): void {
    if (message.type === "COOKIE") return onCookie(message, from);
    if (message.type === "WELCOME") return onWelcome(message, data);
    if (message.type === "ERROR" && message.id === login?.id) return onRefusal(message, data);
    if (message.id !== session?.token || !verifies(data, session.keys.toClient)) return;
    if (!accept(session.window, message.counter)) return;
    if (session.asked) session.asked.tries = 1; // it is there, whatever became of our keepalives
    switch (message.type) {
      case "ALIVE":
        return onAlive(message, from);
      case "USERS":
        return onUsers(message);
      case "INTRODUCTION":
        return onIntroduction(message.peer);
      case "P2PSOMEONEWANTTOCALLYOU":
        return onCall(message.peer, message.body);
      case "RELAYED": {
        const c = conversations.get(message.from === name ? "" : message.from);
        if (c && c.peer?.nonce === message.nonce) onPeerDatagram(message.body, null, c);
        return;
      }
      case "PUNCHED": { // the word of the six-step flow: the peer's hole is open now, so this one will pass
        const c = conversations.get(message.peer);
        if (!c?.punching || c.best) return;
        for (const path of c.paths) if (path.state === "trying") probe(c, path);
        return;
      }
      case "ERROR":
        return onError(message);
      case "LOGOUT":
        return reconnect("the server is going down", LOGIN_RETRY_MS);
    }
  }

  const ephemeralOf = ({ noise }: Handshake & { type: "P2PFIRST" }) => hex(noise.subarray(0, 32));

  /** What a peer sent; `caller` is who the server says it is, if it came over the relay. */
  function onPeerDatagram(data: Uint8Array, origin: Origin, caller?: Conversation): void {
    const handshake = decodeHandshake(data);
    if (!handshake) return onSealed(data, origin);
    if (handshake.type === "P2PSECOND") return onSecond(handshake, origin);
    const copy = ephemerals.get(ephemeralOf(handshake));
    if (!copy) return caller && onFirst(caller, handshake);
    const { conversation, secure } = copy;
    if (!secure?.second) return; // the peer has our answer
    if (!origin) acknowledge(conversation, null, secure); // our answer was lost
    else if (secure === conversation.secure) onPunch(conversation, handshake.probe, origin);
  }

  function conversationWakeAt(c: Conversation): number {
    const at = Math.min(
      c.punching ? c.punching.from + PUNCH_AT_MS[c.punching.step]! : Infinity,
      c.retryAt,
      c.renewAt,
      c.ping?.nextAt ?? Infinity,
      attemptWakeAt(c),
      c.best?.probeAt ?? Infinity,
      c.best?.state === "good" ? c.best.waitingSince + patience(c.best) : Infinity,
      giveUpAt(c),
    );
    if (!session) return at;
    const sent = c.parts.length > 0 && sealing(c) ? c.parts.filter(({ tries }) => tries > 0) : [];
    return Math.min(at, c.askAt, c.opening?.dueAt ?? Infinity, ...sent.map(({ dueAt }) => dueAt));
  }

  const giveUpAt = ({ parts: [first], progressAt }: Conversation) =>
    first ? Math.max(first.message.startedAt, progressAt) + GIVE_UP_MS : Infinity;

  function wakeConversation(c: Conversation): void {
    while (now >= giveUpAt(c)) {
      fail(c, c.parts[0]!.message, c.untrusted ? "untrusted" : c.lastError ?? "timeout");
    }
    if (c.opening && session && now >= c.opening.dueAt) {
      if (isNeeded(c)) sendOpening(c);
      else {
        dropHandshake(c);
        c.opening = null;
      }
    }
    wakePunching(c);
    if (c.best) wakePath(c, c.best);
    wakeAttempt(c);
    if (now >= c.renewAt) {
      c.renewAt = Infinity;
      if (now - c.talkedAt < ABSOLUTE_LIFETIME_MS) startAttempt(c, RENEWAL);
    }
    if (session && now >= c.askAt) askForIntroduction(c);
    if (now >= c.retryAt) {
      c.retryAt = Infinity;
      c.rounds = 0;
      if (isWarm(c)) {
        retryLater(c);
        askForIntroduction(c);
      }
    }
    pump(c);
    wakePing(c);
  }

  const nextDueAt = () => {
    let at = Math.min(linkWakeAt(), session ? listings[0]?.dueAt ?? Infinity : Infinity);
    for (const { dueAt } of queries.values()) at = Math.min(at, dueAt);
    for (const conversation of conversations.values()) at = Math.min(at, conversationWakeAt(conversation));
    return isClosed ? Infinity : at;
  };

  /** Reckoned once for each event: with a thousand conversations that is not little. */
  let dueAt: number | null = null;
  const wakeAt = () => dueAt ??= nextDueAt();

  const nobody = (peer: string) => emit({ event: "error", code: "unknown", message: `There is no "${peer}" here` });

  function carryOut(command: Command): void {
    switch (command.command) {
      case "send":
        return enqueue(command.to, command.text);
      case "getu":
        if (utf8.encode(command.prefix).length > MAX_NAME_BYTES) return emit({ event: "users", users: [] });
        return list(command.prefix, (users) => {
          emit({ event: "users", users: users.map(({ name, public: endpoint }) => ({ name, public: endpoint })) });
        });
      case "path": {
        const peer = command.peer && userName(command.peer);
        const found = [...conversations.values()].filter((c) => !command.peer || c.name === peer);
        for (const c of found) tellPath(c);
        if (found.length > 0 || !command.peer) return;
        const message = `No conversation with "${command.peer}" yet: send something first`;
        return emit({ event: "error", code: "unknown", message });
      }
      case "ping": {
        const c = conversationTo(command.peer);
        if (!c) return nobody(command.peer);
        c.ping = { since: now, left: command.count, lost: 0, nextAt: now, waiting: null };
        touch(c);
        return wakePing(c);
      }
      case "verify": {
        const peer = userName(command.peer);
        if (peer === null) return nobody(command.peer);
        return list(peer, (users) => {
          const c = conversations.get(peer);
          const key = c?.peer?.key ?? users.find(({ name }) => name === peer)?.key; // the one in use comes first
          if (!key) return nobody(peer);
          verified.set(peer, hex(key));
          if (c) c.untrusted = false;
          emit({ event: "verify", peer, code: safetyCode(keys.public, key) });
        });
      }
      case "nat":
        return discovery ? void waitingForNat.push(reportNat) : reportNat();
      case "exit":
        if (session) tell({ type: "LOGOUT" });
        emit({ event: "logout", name, reason: "exit" });
        isClosed = true;
    }
  }

  /** Whether nobody whom we know can have sent that: then it costs no more than this look, however many we know. */
  function isNobodys({ data, from }: Datagram): boolean {
    if (data[0]! < 4) return queries.size === 0;
    if (controlHeader(data)) return !servers.includes(from);
    const handshake = decodeHandshake(data);
    if (!handshake) return !byIndex.has(peerHeader(data)?.index ?? -1);
    return handshake.type === "P2PSECOND" ? !byIndex.has(handshake.to) : !ephemerals.has(ephemeralOf(handshake));
  }

  /** Handles an event that happened `at` some time; `work` says how. */
  function step(at: number, work: () => void): Effect<ClientEvent>[] {
    now = at;
    effects = [];
    if (isClosed) return effects;
    if (now - wakeAt() > JUMP_MS) { for (const conversation of conversations.values()) conversation.progressAt = now; }
    dueAt = null;
    work();
    return effects;
  }

  return {
    opened: (socket, openedPort, at) =>
      step(at, () => {
        if (socket !== 0) {
          opening.get(socket)?.(openedPort);
          opening.delete(socket);
          return;
        }
        port = openedPort;
        beginLogin();
        wakeLink();
      }),
    receive: (datagram, at) =>
      isNobodys(datagram) ? [] : step(at, () => {
        if (datagram.data[0]! < 4) return onStun(datagram.data);
        const control = decode(datagram.data);
        if (control) onControl(control, datagram);
        else onPeerDatagram(datagram.data, { socket: datagram.socket, from: datagram.from });
      }),
    wake: (at) =>
      step(at, () => {
        wakeLink();
        wakeListing();
        wakeQueries();
        for (const conversation of conversations.values()) wakeConversation(conversation);
      }),
    wakeAt,
    command: (command, at) => step(at, () => carryOut(command)),
    interfaces: (found, at) =>
      step(at, () => {
        if (found.join() === addresses.join()) return;
        addresses = found;
        if (session && !login) keepalive();
      }),
  };
}

// ---------------------------------------------------------------------------------------------------- command line

const HELP = `Commands, one a line:
  send NAME MESSAGE   send a message
  getu [PREFIX]       list the users, with their public endpoints
  path [NAME]         which way messages take
  ping NAME [COUNT]   measure the round trip
  nat                 what your NAT is like, and what that means
  verify NAME         a code to compare with the other side, aloud
  sleep SECONDS       wait (in scripts)
  help, exit
`;

const USAGE = `Talks to other users of a Punch server, directly wherever a hole can be punched.

  deno task client [SERVER[:PORT]] [NAME] [options]
  bun client.ts [SERVER[:PORT]] [NAME] [options]

  --port N            local UDP port (default any)
  --secret-file F     what you and your colleague alone know (or PUNCH_SECRET); --secret-file=- asks for it
  --new-secret        print a new secret and end
  --password-file F   the password of the server (or PUNCH_PASSWORD); =- asks for it
  --identity F        keep the key in F: the name is held, and colleagues recognise the key
  --stun HOST:PORT    a STUN server elsewhere, to know one's NAT better
  --no-direct         never punch, stay on the relay
  --json              one JSON object a line on stdout
  --trace             every datagram on stderr

${HELP}`;

/** Interfaces of containers, virtual machines and tunnels: nobody at the other end can come in through them. */
const DEAD_END_INTERFACES = /^(docker|veth|br-|virbr|tun|wg)/;
const INTERFACES_CHECK_MS = 5_000;
const GOODBYE_MS = 50, STUN_PORT = 3478;
/** 20 letters of an alphabet of 32 without look-alikes: 100 bits. */
const SECRET_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789", SECRET_LENGTH = 20, SHORT_SECRET = 16;

/** IP addresses of this host at which it may be reached. */
function localAddresses(): string[] {
  try {
    const all = Object.entries(networkInterfaces()).flatMap(([name, entries]) =>
      (entries ?? []).map(({ address }) => ({ name, address }))
    ).filter(({ address }) => ["private", "public"].includes(scopeOf(address)));
    const alive = all.filter(({ name }) => !DEAD_END_INTERFACES.test(name));
    return (alive.length > 0 ? alive : all).map(({ address }) => address);
  } catch {
    return []; // Deno without --allow-sys=networkInterfaces: then without a path over the LAN
  }
}

/** The server's endpoints, at most one in each IP version. */
async function resolve(server: string, defaultPort: number): Promise<Endpoint[]> {
  const match = /^(?:\[([^\]]+)\]|([^:]*)|(.*:.*:.*))(?::(\d+))?$/.exec(server);
  const host = match?.[1] ?? match?.[2] ?? match?.[3], port = Number(match?.[4] ?? defaultPort);
  if (!host || port < 1 || port > 65535) throw new UsageError(`"${server}" is not a server: SERVER or SERVER:PORT`);
  try {
    const found = await lookup(host, { all: true });
    const endpoints = [4, 6].flatMap((family) => found.filter((entry) => entry.family === family).slice(0, 1))
      .map(({ address }) => formatEndpoint(address, port));
    if (endpoints.length > 0) return endpoints;
  } catch { /* the same as nothing found */ }
  throw new Failure(`Cannot find the server "${host}": check the name, or give its IP address`);
}

/** The keys in a file, made now if there is no such file. */
function identity(file: string): KeyPair {
  try {
    const keys = generateKeys();
    writeFileSync(file, hex(keys.secret) + "\n", { mode: 0o600, flag: "wx" });
    return keys;
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    if (code !== "EEXIST") throw new Failure(`Cannot create the identity "${file}": ${message}`);
  }
  try {
    if (process.platform !== "win32" && (statSync(file).mode & 0o077) !== 0) {
      throw new Failure(`Others can read the identity "${file}": chmod 600 ${file}`);
    }
    const digits = readFileSync(file, "utf8").trim();
    if (/^[0-9a-f]{64}$/.test(digits)) return keysFrom(Uint8Array.from(Buffer.from(digits, "hex")));
  } catch (error) {
    throw error instanceof Failure
      ? error
      : new Failure(`Cannot read the identity "${file}": ${(error as Error).message}`);
  }
  throw new Failure(`"${file}" is not an identity: 64 hex digits; name another file, and it will be created`);
}

function newSecret(): string {
  const letters = [...randomBytes(SECRET_LENGTH)].map((byte) => SECRET_LETTERS[byte % 32]!);
  return letters.join("").replace(/(.{4})(?!$)/g, "$1-");
}

/** Columns that a text takes on a terminal: two for East Asian wide characters and emoji, none for marks. */
function columns(text: string): number {
  const wide =
    /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|\p{Emoji_Presentation}|[\u{20000}-\u{3fffd}]/u;
  return [...text].reduce((sum, letter) => sum + (/\p{M}/u.test(letter) ? 0 : wide.test(letter) ? 2 : 1), 0);
}

/** How an event is told to people, and whether it is an answer (stdout) or about the state of things (stderr). */
function inWords(event: ClientEvent): { text: string; answer: boolean } {
  const answer = (text: string) => ({ text, answer: true }), status = (text: string) => ({ text, answer: false });
  switch (event.event) {
    case "login":
      return status(
        `You are "${event.name}", seen at ${event.public}; ${event.users} here. A colleague joins with:\n` +
          `  deno task client ${event.server} <name>`,
      );
    case "users": {
      const width = Math.max(0, ...event.users.map(({ name }) => columns(name)));
      const lines = event.users.map((user) =>
        `  ${user.name}${" ".repeat(width - columns(user.name))}  ${user.public}`
      );
      return answer([`${lines.length} user${lines.length === 1 ? "" : "s"}:`, ...lines].join("\n"));
    }
    case "message":
      return answer(`${event.from}: ${harmless(event.text)}  (${event.path})`);
    case "sent":
      return answer(
        event.ok
          ? `Send OK! (to ${event.to}, ${event.path}, ${event.ms} ms)`
          : `Send Failure! (to ${event.to}: ${FAILURES[event.reason]})`,
      );
    case "path":
      return answer(
        `The path to ${event.peer} is ${event.path === "relay" ? "over the server" : event.path}, ${event.address}` +
          (event.rttMs === null ? "" : `, round trip ${event.rttMs} ms`),
      );
    case "ping":
      return answer(
        event.rttMs === null
          ? `No answer from ${event.peer} (${event.path}), ${event.lost} lost`
          : `${event.peer} answers in ${event.rttMs} ms (${event.path})`,
      );
    case "verify":
      return answer(`Read this to ${event.peer}, who must see the same: ${event.code}`);
    case "nat":
      return answer(natInWords(event));
    case "error":
      return status(event.message);
    case "reconnecting":
      return status(`Connecting anew: ${event.reason}. Direct conversations go on`);
    case "reconnected":
      return status("Connected again");
    case "logout":
      return status("Logged out");
  }
}

/** What one's NAT means for reaching others. */
function natInWords(nat: NatEvent): string {
  const { mapping, filtering, allocation, hairpin } = nat;
  if (!nat.udp) return "UDP does not reach the server: it is blocked here, or the server is not running";
  const kind = isSymmetric(nat)
    ? `symmetric (${mapping}): each destination sees another port, ${ALLOCATION_WORDS[allocation]}`
    : mapping === "EIM"
    ? "every destination sees the same port (EIM)"
    : "as far as one server can tell, every destination sees the same port (EIM, or ADM: --stun gives a second opinion)";
  const filter = {
    APDF: "Only those you have written to can write to you, port by port (APDF)",
    ADF: "Whoever you have written to can write to you from any port (ADF)",
    EIF: "Anybody can write to you (EIF)",
    unknown: "A port you have not written to can write to you (EIF or ADF)",
  }[filtering];
  const outlook = !isSymmetric(nat)
    ? "direct to everybody but those behind blocked UDP; to random symmetric NATs within seconds"
    : allocation === "random" || allocation === "block"
    ? "direct to everybody whose NAT is not symmetric, within seconds; over the server to the others"
    : "direct to nearly everybody; over the server to symmetric NATs with random ports";
  return [
    `You are seen at ${nat.public}`,
    `Your NAT: ${kind}`,
    filter,
    ...hairpin === null ? [] : [`Two behind it ${hairpin ? "reach" : "do not reach"} each other by its public address`],
    `So you are ${outlook}`,
  ].join("\n  ");
}

const ALLOCATION_WORDS: Record<NatClass["allocation"], string> = {
  preserving: "the one inside if it is free",
  sequential: "one after the other",
  block: "any of a block",
  random: "any",
  unknown: "we do not know which",
};

const FAILURES: Record<Reason, string> = {
  unknown: "there is no such user",
  offline: "has left",
  timeout: "no answer in 15 s",
  empty: "an empty message",
  "too-long": `over ${MAX_MESSAGE_BYTES} bytes`,
  untrusted: "the key or the secret is another one; see verify and --secret-file",
};

/** A line as a command; a text says what is wrong with it, null that there is nothing to do. */
export function parseCommand(line: string): Command | { command: "sleep"; seconds: number } | "help" | Error | null {
  const [, verb = "", rest = ""] = /^\s*(\S*)\s?(.*)$/s.exec(line)!;
  const [peer, times = 3] = rest.match(/\S+/g) ?? [];
  switch (verb) {
    case "":
      return null;
    case "send": {
      const [, to, text = ""] = /^\s*(\S*)\s?(.*)$/s.exec(rest)!;
      return to ? { command: "send", to, text } : new UsageError("Usage: send NAME MESSAGE");
    }
    case "getu":
      return { command: "getu", prefix: peer ?? "" };
    case "path":
      return { command: "path", peer: peer ?? null };
    case "ping": {
      const count = Number(times);
      if (peer && Number.isInteger(count) && count > 0 && count <= 1000) return { command: "ping", peer, count };
      return new UsageError("Usage: ping NAME [COUNT], COUNT of 1 to 1000");
    }
    case "verify":
      return peer ? { command: "verify", peer } : new UsageError("Usage: verify NAME");
    case "sleep":
      return Number(peer) >= 0 ? { command: "sleep", seconds: Number(peer) } : new UsageError("Usage: sleep SECONDS");
    case "nat":
    case "exit":
      return { command: verb };
    case "help":
      return verb;
    default:
      return new UsageError(`Unknown command "${verb}": try help`);
  }
}

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
function rehearse(): void {
  const own = generateKeys(), ephemeral = generateKeys(), secret = new Uint8Array(32);
  const options = { own, peer: own.public, psk: secret, prologue: secret, ephemeral };
  const initiation = initiate(options, secret);
  const answer = initiation && respond(options, initiation.message)?.answer(secret);
  const finished = answer && initiation.finish(answer.message);
  if (!finished) return;
  const data = sealPeer({ type: "P2PTRASH", probe: 0 }, { index: 0, counter: 0, key: finished.keys.send });
  openPeer(data, answer.keys.receive);
}

async function main(): Promise<void> {
  const { parseArgs } = await import("deno-std@1.4.0/cli/parse_args.js");
  const unknown: string[] = [];
  const args = parseArgs(process.argv.slice(2), {
    string: ["port", "secret-file", "password-file", "identity", "stun", "_"],
    boolean: ["new-secret", "direct", "json", "trace", "help"],
    default: { direct: true },
    negatable: ["direct"],
    unknown: (arg: string) => arg.startsWith("-") ? unknown.push(arg) < 0 : true,
  });
  if (args.help) return void process.stdout.write(USAGE);
  if (args["new-secret"]) return console.log(newSecret());
  const port = Number(args.port === undefined ? 0 : args.port || NaN);
  if (unknown.length > 0) throw new UsageError(`Unknown argument "${unknown[0]}"`);
  if (!Number.isInteger(port) || port < 0 || port > 65535) throw new UsageError(`"${args.port}" is not a port`);
  if (args._.length > 2) throw new UsageError(`Too many arguments: "${args._[2]}"`);

  const secret = await secretWords({ file: args["secret-file"], variable: "PUNCH_SECRET", label: "secret" });
  if (secret !== undefined && secret.length < SHORT_SECRET) {
    console.error(`The secret is short, somebody may guess it: better take one from --new-secret`);
  }
  const password = await secretWords({ file: args["password-file"], variable: "PUNCH_PASSWORD", label: "password" });

  const isTerminal = process.stdin.isTTY === true;
  const screen = isTerminal ? createInterface({ input: process.stdin, output: process.stdout, prompt: "> " }) : null;
  const lines = screen?.[Symbol.asyncIterator]() ?? pipedLines();
  const ask = async (what: string, given: unknown): Promise<string> => {
    if (given !== undefined) return String(given);
    if (!isTerminal) throw new UsageError(`The ${what} is missing`);
    process.stdout.write(`${what}: `);
    const { value, done } = await lines.next();
    if (done) process.exit(1);
    return value.trim() || ask(what, given);
  };
  const servers = await resolve(await ask("server", args._[0]), DEFAULT_PORT);
  const wanted = await ask("name", args._[1]);
  const name = userName(wanted);
  if (name === null) throw new UsageError(`"${wanted}" is not a name: 1 to 32 bytes without blanks`);
  const client = createClient({
    name,
    keys: args.identity === undefined ? generateKeys() : identity(args.identity),
    servers,
    random: (length) => Uint8Array.from(randomBytes(length)),
    generateKeys,
    psk: keyFromWords(secret, "secret"),
    password: keyFromWords(password, "password"),
    observer: args.stun === undefined ? undefined : (await resolve(args.stun, STUN_PORT)).find((to) => !isIPv6(to)),
    keepName: args.identity !== undefined,
    direct: args.direct,
    patient: isTerminal,
  });

  let failed = false, ended = false, isIn = false, isListed = false;
  let onEvent: (event: ClientEvent) => void = () => {};
  const say = (event: ClientEvent) => {
    if (args.json) console.log(jsonLine(event));
    else show(inWords(event));
    if (isIn && !isListed && (event.event === "users" || (event.event === "error" && event.code === "unreachable"))) {
      isListed = true; // the list at login is nobody's answer
      return;
    }
    isIn ||= event.event === "login";
    onEvent(event);
    // What others do, such as calling with another secret, is no failure of ours.
    if ((event.event === "sent" && !event.ok) || (event.event === "error" && !event.notice)) failed = true;
    if (event.event === "error" && event.fatal) end(1);
  };
  const show = ({ text, answer }: { text: string; answer: boolean }) => {
    const colour = isTerminal && !environment("NO_COLOR") && !answer;
    if (isTerminal) {
      cursorTo(process.stdout, 0);
      clearLine(process.stdout, 0);
    }
    (answer ? process.stdout : process.stderr).write((colour ? `\x1b[2m${text}\x1b[0m` : text) + "\n");
    if (!ended) screen?.prompt(true);
  };
  rehearse();
  const trace = args.trace ? createTrace() : undefined;
  client.interfaces(localAddresses(), clock());
  const run = (host: string) => listen(client, { sockets: [{ host, port }], onEvent: say, onDatagram: trace });
  const running = await listenOrFail(run, { json: args.json });
  const perform = (command: Command) => running.perform(client.command(command, clock()));
  setInterval(() => running.perform(client.interfaces(localAddresses(), clock())), INTERFACES_CHECK_MS);

  function end(code: number): void {
    if (ended) return;
    ended = true;
    perform({ command: "exit" });
    setTimeout(() => process.exit(code), GOODBYE_MS);
  }
  for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => end(130));
  screen?.on("SIGINT", () => end(130));

  /** Does it, and waits for what comes of it. */
  const outcome = (command: Command) =>
    new Promise<void>((resolve) => {
      const { command: verb } = command;
      const wanted = verb === "send" ? "sent" : verb === "getu" ? "users" : verb; // the others are called alike
      let left = command.command === "ping" ? command.count : 1;
      onEvent = (event) => {
        if (event.event === wanted) --left;
        const hasFailed = event.event === "error" && !event.notice && verb !== "send";
        if (left <= 0 || hasFailed) resolve();
      };
      perform(command);
      if (verb === "path") resolve();
    });

  await new Promise<void>((resolve) => {
    onEvent = (event) => event.event === "login" && resolve();
  });
  perform({ command: "getu", prefix: "" });
  screen?.prompt();
  for await (const line of { [Symbol.asyncIterator]: () => lines }) {
    const command = parseCommand(line);
    trace?.restart();
    if (command === null) continue;
    else if (command instanceof Error) {
      say({ event: "error", code: "usage", message: command.message });
    } else if (command === "help") show({ text: HELP, answer: !args.json });
    else if (command.command === "sleep") await new Promise((done) => setTimeout(done, command.seconds * 1000));
    else if (command.command === "exit") break;
    else if (isTerminal) perform(command);
    else await outcome(command);
    screen?.prompt();
  }
  end(failed && !isTerminal ? 1 : 0);
}

if (import.meta.main) await main().catch(exitWith);
