/**
 * The rendezvous server: it knows who is there and at which public endpoint, introduces two users to each other,
 * and passes their sealed datagrams on until they reach each other directly. It cannot read them.
 *
 *     client                          server
 *       | LOGIN, padded                 |   no state is kept and nothing larger is sent ...
 *       |------------------------------>|
 *       |                        COOKIE |
 *       |<------------------------------|   ... until the client has shown that it receives at its address
 *       | LOGIN with cookie and MAC     |
 *       |------------------------------>|
 *       |                       WELCOME |   from here on everything has a counter and a MAC
 *       |<------------------------------|
 *       | P2PTRANS to bob               |
 *       |------------------------------>|   INTRODUCTION to alice and, in the same tick,
 *       |                               |   P2PSOMEONEWANTTOCALLYOU to bob: now both punch
 *
 * Each room below is one function with its own state. Rooms do not know each other: `createServer` puts them together.
 *
 * @module
 */
import { randomBytes, timingSafeEqual } from "node:crypto";
import process from "node:process";
import { addressBytes, type Endpoint, formatEndpoint, hostOf, isIPv6, parseEndpoint, scopeOf } from "./protocol.ts";
import { CONTROL, type Control, type ControlBody, controlHeader, decode, encode, isFromClient } from "./protocol.ts";
import { hex, type Introduced, MAX_NAME_BYTES, MAX_RELAYED_BYTES, MIN_CLIENT_BYTES, userName } from "./protocol.ts";
import { accept, isSeen, type ReplayWindow, replayWindow, sipHash, verifies } from "./protocol.ts";
import { controlKeys, diffieHellman, type KeyPair, loginKey, passwordProof, publicNonce } from "./protocol.ts";
import { conform, createLimit, generateKeys, keyFromWords, type NatClass, type Rate, type User } from "./protocol.ts";
import { decodeStun, encodeStunResponse, STUN_CHANGE_REQUEST, STUN_RESPONSE_PORT } from "./protocol.ts";
import { type Datagram, type Effect, listen, listenOrFail, type Machine } from "./protocol.ts";
import { clock, createTrace, DEFAULT_PORT, exitWith, jsonLine, secretWords, UsageError } from "./protocol.ts";

// ---------------------------------------------------------------------------------------------------- options, events

/** What the server tells its operator. */
export type ServerEvent =
  | { event: "listening"; address: string; port: number; altPort: number }
  | { event: "login" | "moved"; name: string; public: Endpoint }
  | { event: "logout"; name: string; reason: "left" | "vanished" | "replaced" };

/** What the server is made of; everything random comes in here. */
export interface ServerOptions {
  /** The server's own keys. */ keys: KeyPair;
  /** So many unpredictable bytes. */ random: (length: number) => Uint8Array;
  /** scrypt of the password, if one is asked for. */ password?: Uint8Array | undefined;
  /** Most users at a time. */ maxUsers?: number | undefined;
  /** Most users at a time from one /24 or IPv6 /48. */ maxPerAddress?: number | undefined;
  /** The address of sockets 0 to 2 and that of 3 and 4, if there are two. */ hosts?: [string, string] | undefined;
}

/** A server without sockets. It wants 0: main port, 1: second port, 2: any port; 3, 4: as 0, 1 at a second address. */
export interface Server extends Machine<ServerEvent> {
  /** Tells all clients that the server is going. */
  stop(): Effect<ServerEvent>[];
}

/** Everything that a room gets from outside. Whatever rooms send and emit leaves in the order in which it happens. */
interface Io {
  readonly now: number;
  random(length: number): Uint8Array;
  allows(key: string, what: keyof typeof LIMITS, cost?: number): boolean; // the key: a token or a prefix
  emit(event: ServerEvent): void;
  send(to: Address, data: Uint8Array): void;
}

/** An endpoint, and which of our sockets reaches it. */
type Address = { endpoint: Endpoint; socket: number };

/** The part of an address that one customer of a provider usually has to himself: IPv4 /24, IPv6 /48. */
function prefixOf(endpoint: Endpoint): string {
  const host = hostOf(endpoint);
  return isIPv6(endpoint) ? hex(addressBytes(host)!.subarray(0, 6)) : host.slice(0, host.lastIndexOf("."));
}

const utf8 = new TextEncoder();

// ---------------------------------------------------------------------------------------------------- the login ladder
//
// Whoever wants to log in climbs this ladder. Each rung tells us more about the client and costs us more than the one
// before, so that nobody makes us work hard without working himself. The ladder does not know who is logged in.
//
//     rung                                         now we know that the client ...           it has cost us
//     65 bytes; the strangers' limit lets it pass   (nothing: see "limits")                   a look at them
//     the cookie, a MAC over its endpoint          receives where it says it is              2 SipHashes, no memory
//     the limit of its prefix lets it pass         is not one of thousands                   a number
//     MAC under the key that both agree on         owns the public key in its LOGIN          an X25519
//     proof of the password, if there is one       has been told the password                an HKDF
//     nobody else has the name, see `claim`        may have it                               a session

/** A cookie is valid in its epoch and in the next one. For so long others can repeat a LOGIN that they have seen. */
const COOKIE_EPOCH_MS = 30_000, COOKIE_LIFE_MS = 2 * COOKIE_EPOCH_MS;

type Login = Control & { type: "LOGIN" };
type Refusal = { reason: string; seconds: number }; // after which to ask again makes sense; 0: nobody knows
type Admit = (login: Login, at: Address, shared: Uint8Array) => Refusal | undefined;

function createLadder(io: Io, { keys, password }: ServerOptions, admit: Admit) {
  const cookieKey = io.random(16);

  function cookieOf(endpoint: Endpoint, epochsAgo: 0 | 1): string {
    const epoch = Math.floor(io.now / COOKIE_EPOCH_MS) - epochsAgo;
    return hex(sipHash(cookieKey, utf8.encode(`${epoch} ${endpoint}`)));
  }
  const isCookieOf = (endpoint: Endpoint, cookie: string) =>
    cookie === cookieOf(endpoint, 0) || cookie === cookieOf(endpoint, 1);

  /** The only answer that a stranger gets; never larger than the question, which MIN_CLIENT_BYTES sees to. */
  function challenge(at: Address, asked: Control, known: 0 | 1): void {
    io.send(at, encode({ type: "COOKIE", cookie: cookieOf(at.endpoint, 0), key: keys.public, known }, asked));
  }

  function climb(login: Login, at: Address, data: Uint8Array): void {
    const { id, counter, name } = login;
    if (!isCookieOf(at.endpoint, login.cookie)) return challenge(at, login, 0);
    if (!io.allows(prefixOf(at.endpoint), "logins")) return;
    const shared = diffieHellman(keys.secret, login.key), key = shared && loginKey(shared, id);
    if (!key || !verifies(data, key)) return;
    const refusal = objection(login, shared) ?? admit(login, at, shared);
    if (refusal) io.send(at, encode({ type: "ERROR", about: name, ...refusal }, { id, counter, key }));
  }

  /** What is wrong with a LOGIN, whoever has the name. */
  function objection({ id, name, proof }: Login, shared: Uint8Array): Refusal | undefined {
    if (userName(name) !== name) return { reason: "bad-name", seconds: 0 };
    const right = password ? passwordProof(shared, { password, id }) : proof;
    if (!timingSafeEqual(utf8.encode(right), utf8.encode(proof))) return { reason: "bad-password", seconds: 0 };
  }

  return { climb, challenge, isCookieOf };
}

// ---------------------------------------------------------------------------------------------------- sessions
//
// A session is a client that has a name, and an address at which it receives. The sessions do not know how a login is
// proved, nor what the clients have to say to each other.
//
//     LOGIN --claim--> session ----- LOGOUT, or silent for 60 s -----> former user ---- 1 h ----> forgotten
//                       |   ^                                             |
//                       +---+ KEEPALIVE with a cookie: it has moved       +--claim--> session

const SILENCE_MS = 60_000; // after so long a client has vanished: three of its keepalives are lost
const NAME_HELD_MS = 300_000; // for so much longer the key of a vanished client that asked for it holds the name
const REMEMBERED_MS = 3_600_000; // for so long a name that was here is called "offline" rather than "unknown"
const MAX_USERS = 100_000, MAX_PER_ADDRESS = 2_000, MAX_PREFIXES = 50_000, MAX_REMEMBERED = 10_000;

interface Session {
  token: string; // index of the session, known to its client alone
  clock: number; // the counter of its LOGIN, which is the client's clock
  name: string;
  nonce: string; // by which other users know this login; the id in LOGIN is a secret
  key: Uint8Array; // the client's X25519 public key
  keys: { toServer: Uint8Array; toClient: Uint8Array }; // of the MACs
  window: ReplayWindow; // which counters the client has used
  sent: number; // the last counter that we have used
  home: Address; // where the client has returned a cookie from: with LOGIN, or later with KEEPALIVE
  other: Address | null; // the same in the other IP version
  local: Endpoint[]; // what the client takes its own addresses to be
  keepName: boolean; // whether its key holds the name when it has vanished
  nat: NatClass; // what the client takes its NAT to be
  rttMs: number; // its round trip to us, as it has measured it
  heardAt: number;
}
type FormerUser = Pick<Session, "key" | "clock"> & { leftAt: number; heldMs: number }; // so long the key holds the name
type Claim = "new" | "again" | "replaces" | { refusedFor: number }; // seconds

const UNKNOWN_NAT: NatClass = { mapping: "unknown", filtering: "unknown", allocation: "unknown" };

/** Whether the client has shown that it receives there. */
const isAt = ({ home, other }: Session, endpoint: Endpoint) =>
  endpoint === home.endpoint || endpoint === other?.endpoint;
const sameKey = (one: Uint8Array, other: Uint8Array) => one.every((byte, i) => byte === other[i]);

type Sessions = ReturnType<typeof createSessions>;
type Greet = (session: Session, login: Login, at: Address, isNew: boolean) => void;
function createSessions(io: Io, options: ServerOptions, directory: Directory, greet: Greet) {
  const { maxUsers = MAX_USERS, maxPerAddress = MAX_PER_ADDRESS } = options;
  const byToken = new Map<string, Session>(), formerUsers = new Map<string, FormerUser>(); // these by name
  const usedLoginIds = new Map<string, number>(); // until when the cookie of that login is valid
  const usersAt = new Map<string, number>(); // how many a prefix has

  // Who may have a name: the first row that is true. An observer may repeat a LOGIN that he has seen: the key in it is
  // the right one, but its clock is no later than the last one that we know.
  //
  //     the name is ...   and is asked for by ...                    claim
  //     a session's       the very login that made the session       again: our WELCOME was lost
  //     a session's       another key, or its key, no later clock    refused until it has been silent for 60 s
  //     a former user's   another key                                refused while it is held for the former one
  //     a former user's   its key, with no later clock               refused while it may be a repetition
  //     anything else     a login that was here already              refused: repeated; others had the name since
  //     anything else     anybody                                    new, or replaces the session
  function claim(login: Login, nonce: string): Claim {
    const holder = directory.find(login.name), former = formerUsers.get(login.name); // never both
    const last = holder ?? former, isSameKey = last !== undefined && sameKey(last.key, login.key);
    const isLater = isSameKey && login.counter > last.clock;
    const refusedUntil = (at: number) => ({ refusedFor: Math.max(0, Math.ceil((at - io.now) / 1000)) });

    if (holder && isSameKey && holder.nonce === nonce) return "again";
    if (holder && !isLater) return refusedUntil(holder.heardAt + SILENCE_MS);
    const freeAt = former && !isLater ? former.leftAt + (isSameKey ? COOKIE_LIFE_MS : former.heldMs) : 0;
    if (freeAt > io.now) return refusedUntil(freeAt);
    if (usedLoginIds.has(login.id)) return { refusedFor: 0 }; // a repetition; others have had the name since
    return holder ? "replaces" : "new";
  }

  /** Lets in whoever has climbed the ladder, or says why not. */
  function admit(login: Login, at: Address, shared: Uint8Array): Refusal | undefined {
    const nonce = publicNonce(login.id), claimed = claim(login, nonce), holder = directory.find(login.name);
    if (typeof claimed === "object") return { reason: "name-taken", seconds: claimed.refusedFor };
    if (holder && claimed === "again") {
      const hadNoWelcome = holder.window.highest < 0; // a client that has had it does not ask from elsewhere
      if (at.endpoint !== holder.home.endpoint && hadNoWelcome) move(holder, at);
      return void greet(holder, login, at, false);
    }
    const stays = holder && prefixOf(holder.home.endpoint) === prefixOf(at.endpoint);
    if ((!holder && directory.size() >= maxUsers) || (!stays && !hasPlace(at))) return { reason: "full", seconds: 0 };
    if (holder) remove(holder, "replaced");

    const { id, counter: clock, name, local, rttMs } = login, token = hex(io.random(8));
    const theirs = { clock, name, nonce, key: login.key.slice(), local, keepName: login.keepName === 1, rttMs };
    const ours = { token, keys: controlKeys(shared, token), window: replayWindow(), sent: clock, heardAt: io.now };
    const session: Session = { ...theirs, ...ours, home: at, other: null, nat: UNKNOWN_NAT };
    byToken.set(token, session);
    directory.put(session);
    countUser(at, 1);
    formerUsers.delete(name);
    if (usedLoginIds.size >= MAX_USERS) usedLoginIds.delete(usedLoginIds.keys().next().value!);
    usedLoginIds.set(id, io.now + COOKIE_LIFE_MS);
    io.emit({ event: "login", name, public: at.endpoint });
    greet(session, login, at, true);
  }

  function remove(session: Session, reason: "left" | "vanished" | "replaced"): void {
    const { token, name, key, clock } = session;
    byToken.delete(token);
    directory.remove(name);
    countUser(session.home, -1);
    io.emit({ event: "logout", name, reason });
    if (reason === "replaced") return;
    if (formerUsers.size >= MAX_REMEMBERED) { // the oldest one goes; one whose name is held only if all are
      const unheld = formerUsers.entries().find(([, { leftAt, heldMs }]) => leftAt + heldMs <= io.now);
      formerUsers.delete(unheld ? unheld[0] : formerUsers.keys().next().value!);
    }
    const heldMs = reason === "vanished" && session.keepName ? NAME_HELD_MS : 0;
    formerUsers.set(name, { key, clock, leftAt: io.now, heldMs });
  }

  /** The client receives there now. Nothing happens if the prefix is full, or if the client moves all the time. */
  function move(session: Session, to: Address): void {
    if (isIPv6(to.endpoint) !== isIPv6(session.home.endpoint)) return void (session.other = to);
    const stays = prefixOf(to.endpoint) === prefixOf(session.home.endpoint);
    if (!stays && !(hasPlace(to) && io.allows(session.token, "moves"))) return;
    countUser(session.home, -1);
    session.home = to;
    countUser(to, 1);
    io.emit({ event: "moved", name: session.name, public: to.endpoint });
  }

  function hasPlace({ endpoint }: Address): boolean {
    const users = usersAt.get(prefixOf(endpoint)) ?? 0;
    return users < maxPerAddress && (users > 0 || usersAt.size < MAX_PREFIXES);
  }

  function countUser({ endpoint }: Address, change: 1 | -1): void {
    const prefix = prefixOf(endpoint), users = (usersAt.get(prefix) ?? 0) + change;
    if (users > 0) usersAt.set(prefix, users);
    else usersAt.delete(prefix);
  }

  /** Whether the client itself has said this, and for the first time: then it is alive. */
  function hear(session: Session, data: Uint8Array, counter: number): boolean {
    if (!verifies(data, session.keys.toServer) || !accept(session.window, counter)) return false;
    session.heardAt = io.now;
    return true;
  }

  function keepAlive(session: Session, message: Control & { type: "KEEPALIVE" }, at: Address, hasMoved: boolean): void {
    session.rttMs = message.rttMs;
    session.nat = message.nat;
    session.local = message.local;
    if (hasMoved) move(session, at);
    if (!isAt(session, at.endpoint)) return;
    toClient(session, { type: "ALIVE", asked: message.counter, public: at.endpoint }, at);
  }

  function toClient(session: Session, message: ControlBody, to = session.home): void {
    io.send(to, encode(message, { id: session.token, counter: ++session.sent, key: session.keys.toClient }));
  }

  function refuse(session: Session, reason: string, about = ""): void {
    if (io.allows(session.token, "errors")) toClient(session, { type: "ERROR", reason, about, seconds: 0 });
  }

  function sweep(): void {
    for (const [name, { leftAt }] of formerUsers) if (leftAt + REMEMBERED_MS <= io.now) formerUsers.delete(name);
    for (const [id, staleAt] of usedLoginIds) if (staleAt <= io.now) usedLoginIds.delete(id);
    for (const session of byToken.values()) if (io.now - session.heardAt >= SILENCE_MS) remove(session, "vanished");
  }

  const find = (token: string) => byToken.get(token), all = () => byToken.values();
  const wasHere = (name: string) => formerUsers.has(name);
  const isEmpty = () => byToken.size + formerUsers.size + usedLoginIds.size === 0;
  return { find, all, wasHere, admit, hear, keepAlive, remove, toClient, refuse, sweep, isEmpty };
}

// ---------------------------------------------------------------------------------------------------- introductions
//
// A NAT lets a datagram in only where one has gone out before. So both must send at about the same time, each to where
// the other one is seen: this is what an introduction tells them. Until one of those datagrams has come through, all
// messages pass here, and the first one travels together with the call. This room cannot read what it passes on.

const MAX_PUNCH_DELAY_MS = 150; // most that the nearer of two peers waits, since each round trip is a client's word

/** Where a session's client has shown that it receives: IPv4, IPv6 or both. */
const endpointsOf = ({ home, other }: Session) => other ? [home.endpoint, other.endpoint] : [home.endpoint];

/** Where `viewer` may try to reach `subject`: where we see it and, behind the same NAT, its private addresses. */
function candidatesFor(subject: Session, viewer: Session): Endpoint[] {
  const siteOf = (endpoint: Endpoint) => hex(addressBytes(hostOf(endpoint))!.subarray(0, 8)); // IPv4 address, IPv6 /64
  const sites = endpointsOf(viewer).map(siteOf);
  const isSameSite = endpointsOf(subject).some((endpoint) => sites.includes(siteOf(endpoint)));
  const isThisHost = scopeOf(hostOf(subject.home.endpoint)) === "loopback"; // then nothing is nearer than that
  const isPrivate = (endpoint: Endpoint) => scopeOf(hostOf(endpoint)) === "private";
  return [...new Set([...isSameSite && !isThisHost ? subject.local.filter(isPrivate) : [], ...endpointsOf(subject)])];
}

// Both introductions leave in the same tick. The nearer peer has its own earlier, by half the difference of the round
// trips, and waits for so long, so that the first punches cross on the way: why, says "paths" in client.ts.
function introduction(subject: Session, viewer: Session): Introduced {
  const punchAfterMs = Math.min(MAX_PUNCH_DELAY_MS, Math.max(0, (subject.rttMs - viewer.rttMs) >> 1));
  const { name, nonce, key, nat } = subject;
  return { name, nonce, key, candidates: candidatesFor(subject, viewer), nat, punchAfterMs };
}

function createRelay(io: Io, { find }: Directory, { toClient, refuse, wasHere }: Sessions) {
  return {
    pass(session: Session, { to, nonce, call, body }: Control & { type: "P2PTRANS" }): void {
      const target = find(to);
      if (!target) return refuse(session, wasHere(to) ? "offline" : "unknown", to);
      if (body.length > MAX_RELAYED_BYTES) return refuse(session, "too-long", to);
      if (!io.allows(session.token, "relayedBytes", body.length)) return refuse(session, "busy", to);
      const isCurrent = nonce === target.nonce; // else it is sealed for an earlier login: nobody could open it
      if (isCurrent && !call) {
        return toClient(target, { type: "RELAYED", from: session.name, nonce: session.nonce, body });
      }
      if (!io.allows(session.token, "calls")) return refuse(session, "busy", to);
      const readable = body.subarray(0, isCurrent ? body.length : 0);
      toClient(target, { type: "P2PSOMEONEWANTTOCALLYOU", peer: introduction(session, target), body: readable });
      toClient(session, { type: "INTRODUCTION", peer: introduction(target, session) });
    },
    punched(session: Session, { peer }: Control & { type: "PUNCHED" }): void {
      const target = find(peer);
      if (target && io.allows(session.token, "punches")) toClient(target, { type: "PUNCHED", peer: session.name });
    },
  };
}

// ---------------------------------------------------------------------------------------------------- list of users
//
// In order of name, in pages of one datagram each. Whoever wants more asks for what comes after the last name he has.

const PAGE_BYTES = 1_040; // the last user begins at 1,039 at most: 1,039 + 92 for the longest + 60 around them = 1,191
const PAGES_PER_ANSWER = 16; // more would overflow the asker's socket buffer (92 full datagrams on Linux)
const ANNOUNCE_UP_TO = 16; // while so few are logged in, all hear of a newcomer: nobody has to ask before he writes

const scratch = new Uint8Array(MAX_NAME_BYTES);
const asUser = ({ name, nonce, key, home }: Session): User => ({ name, nonce, key, public: home.endpoint });
/** Length and name, nonce, key, length and address, port; see `user` in protocol.ts. */
const userBytes = ({ name, home }: Session) =>
  1 + utf8.encodeInto(name, scratch).written + 8 + 32 + 1 + (isIPv6(home.endpoint) ? 16 : 4) + 2;

function createList(io: Io, directory: Directory, { toClient, refuse }: Sessions) {
  function nextPage(entries: Iterator<Session>): User[] {
    const users: User[] = [];
    for (let left = PAGE_BYTES; left > 0;) {
      const { value: session, done } = entries.next();
      if (done) break;
      left -= userBytes(session);
      users.push(asUser(session));
    }
    return users;
  }

  return {
    firstPage: () => nextPage(directory.after("", "")),
    answer(session: Session, { counter: asked, prefix, after }: Control & { type: "GETALLUSER" }): void {
      const entries = directory.after(prefix, after), pages = [nextPage(entries)];
      while (pages.at(-1)!.length > 0 && pages.length < PAGES_PER_ANSWER) pages.push(nextPage(entries));
      const more = Number(pages.at(-1)!.length > 0);
      if (!more && pages.length > 1) pages.pop();
      if (!io.allows(session.token, "pages", pages.length)) return refuse(session, "busy");
      const total = directory.size(), last = pages.length - 1;
      pages.forEach((users, page) => toClient(session, { type: "USERS", asked, page, last, more, total, users }));
    },
    announce(newcomer: Session, all: Iterable<Session>): void {
      const total = directory.size(), users = [asUser(newcomer)];
      if (total > ANNOUNCE_UP_TO) return;
      const message = { type: "USERS", asked: 0, page: 0, last: 0, more: 0, total, users } as const;
      for (const session of all) if (session !== newcomer) toClient(session, message);
    },
  };
}

// ==================================================================================================== reference
//
// Skip this at first reading: limits, directory, STUN. Behind them `createServer` puts the rooms together.

// ---------------------------------------------------------------------------------------------------- limits
//
// What others can have us do, and how often. A limit is one number (see `conform`): one for all strangers together, or
// one for each session or prefix. This room does not know what it limits.

interface Rule extends Rate {
  maxKeys?: number; // most keys at a time
  whenFull?: Rate; // what all other keys together may do then; without it they are refused
}
const LIMITS = {
  // Of a session
  datagrams: { perSecond: 2_000, burst: 5_000 }, // of all kinds; 2,000 of 131 bytes are the 256 KiB below
  calls: { perSecond: 20, burst: 100 },
  punches: { perSecond: 100, burst: 200 }, // of reports that one has punched: others' calls must not use up one's own
  moves: { perSecond: 1, burst: 10 },
  pages: { perSecond: 200, burst: 2_000 },
  relayedBytes: { perSecond: 256 * 1024, burst: 512 * 1024 },
  errors: { perSecond: 10, burst: 20 },
  // Of a prefix. STUN cannot ask for a cookie, and only its answers are larger than the questions: 1.6 times, 2.2 with
  // IPv6, 2.8 and 4.6 with a second address. Whoever forges a victim's address has no more than this sent to it.
  logins: { perSecond: 50, burst: 2_000, maxKeys: MAX_PREFIXES },
  stun: { perSecond: 50, burst: 400, maxKeys: 10_000, whenFull: { perSecond: 200, burst: 200 } },
} satisfies Record<string, Rule>;
// Of all together. Those who seem to have a cookie and the other strangers each have their own limit.
const STUN_ALTOGETHER: Rate = { perSecond: 2_000, burst: 2_000 }, STRANGERS: Rate = { perSecond: 5_000, burst: 5_000 };

/** A limit for each key, by the same rule. What a key has used is forgotten when its limit is whole again. */
function createLimiter(rule: Rule) {
  const { maxKeys = Infinity, whenFull } = rule;
  const arrivals = new Map<string, number>(); // by key: the theoretical arrival time
  const newcomers = whenFull ? createLimit(whenFull) : () => false;
  return {
    allows(key: string, now: number, cost = 1): boolean {
      const arrival = arrivals.get(key);
      if (arrival === undefined && arrivals.size >= maxKeys) return newcomers(now, cost);
      const next = conform(arrival ?? 0, rule, now, cost);
      if (next !== null) arrivals.set(key, next);
      return next !== null;
    },
    sweep(now: number): void {
      for (const [key, arrival] of arrivals) if (arrival <= now) arrivals.delete(key);
    },
    isEmpty: () => arrivals.size === 0,
  };
}

function createLimits() {
  const strangers = createLimit(STRANGERS), withCookie = createLimit(STRANGERS);
  const stunAltogether = createLimit(STUN_ALTOGETHER);
  const rows = Object.entries(LIMITS).map(([what, rule]) => [what, createLimiter(rule)]);
  const limiters: Record<keyof typeof LIMITS, ReturnType<typeof createLimiter>> = Object.fromEntries(rows);
  let time = 0, last: number | undefined;
  const allows: Io["allows"] = (key, what, cost) => limiters[what].allows(key, time, cost);
  return {
    allows,
    /** The limits' own time begins at 0, so that sums are exact; it never goes back, so that no limit stays used up. */
    setTime(now: number): void {
      time += Math.max(0, now - (last ?? now));
      last = now;
    },
    mayAskStun: (from: Endpoint) => allows(prefixOf(from), "stun") && stunAltogether(time),
    isWorthDecoding(data: Uint8Array): boolean {
      if (data.length < MIN_CLIENT_BYTES) return false; // not even a cookie in answer: that could be larger
      // The cookie is the first field of LOGIN, behind the header of 16 bytes.
      const hasCookie = data[1] === CONTROL.LOGIN.code && data.subarray(16, 24).some((byte) => byte !== 0);
      return (hasCookie ? withCookie : strangers)(time);
    },
    sweep: () => Object.values(limiters).forEach((limiter) => limiter.sweep(time)),
    isEmpty: () => Object.values(limiters).every((limiter) => limiter.isEmpty()),
  };
}

// ---------------------------------------------------------------------------------------------------- the directory
//
// Who is there, by name and in order of name: all that several servers would have to share. It does not know what a
// session is, only that it has a name.

type Directory = ReturnType<typeof createDirectory<Session>>;

function createDirectory<T extends { name: string }>() {
  const byName = new Map<string, T>();
  const names: string[] = []; // sorted by code unit
  const position = (name: string) => {
    let low = 0, high = names.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (names[middle]! < name) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  return {
    size: () => names.length,
    find: (name: string) => byName.get(name),
    put(entry: T): void {
      if (!byName.has(entry.name)) names.splice(position(entry.name), 0, entry.name);
      byName.set(entry.name, entry);
    },
    remove(name: string): void {
      if (byName.delete(name)) names.splice(position(name), 1);
    },
    /** Those whose name begins with the prefix and comes after the other, in order. */
    *after(prefix: string, after: string): Generator<T> {
      let at = position(after > prefix ? after : prefix);
      if (names[at] === after) at++;
      while (at < names.length && names[at]!.startsWith(prefix)) yield byName.get(names[at++]!)!;
    },
  };
}

// ---------------------------------------------------------------------------------------------------- STUN
//
// How somebody's endpoint looks from here, told from another port or address if he wants to know what his NAT lets in
// (RFC 5780). This room knows nobody and remembers nothing.
//
//     sockets           main port   second port   any port
//     at our address    0           1             2
//     at a second one   3           4

const SECOND_PORT = 1, THIRD_PORT = 2, SECOND_ADDRESS = 3;
// Which socket answers a request that came in at socket 0, 1, ... (RFC 5780, section 6.1). Another port is the third
// one, so that nobody who asks what his NAT lets in has ever written to where the answer comes from.
const STUN_FROM = { same: [0, 1, 2, 3, 4], port: [2, 2, 0, 4, 3], address: [3, 4, 3, 0, 1], both: [4, 3, 4, 1, 0] };

function createStun(io: Io, { hosts }: ServerOptions) {
  const ports = [0, 0, 0, 0, 0]; // of our sockets; 0: not open
  const own = (socket: number) => hosts && formatEndpoint(hosts[socket < SECOND_ADDRESS ? 0 : 1], ports[socket]!);
  return {
    opened: (socket: number, port: number) => void (ports[socket] = port),
    portOf: (socket: number) => ports[socket]!,
    answer({ socket, from, data }: Datagram): void {
      const asked = decodeStun(data);
      if (asked?.kind !== "request" || !parseEndpoint(from)) return;
      const change = asked.changeIp ? asked.changePort ? "both" : "address" : asked.changePort ? "port" : "same";
      const answerer = STUN_FROM[change][socket]!, unknown = [...asked.unknown];
      if (asked.responsePort && !hosts) unknown.push(STUN_RESPONSE_PORT);
      if (ports[answerer] === 0) unknown.push(STUN_CHANGE_REQUEST);
      if (unknown.length === 0) {
        // Another port of the asker's own: whoever can forge his address could have named that port as well.
        const endpoint = asked.responsePort ? formatEndpoint(hostOf(from), asked.responsePort) : from;
        const answer = { mapped: from, origin: own(answerer), other: own(STUN_FROM.both[socket]!) };
        return io.send({ socket: answerer, endpoint }, encodeStunResponse(asked, answer));
      }
      // Without that socket it is an error: silence would look like a NAT that filters (RFC 5780, section 6.1). But a
      // classic client takes whatever comes in for the answer that it hopes for: there silence errs to the safe side.
      if (asked.classic && asked.unknown.length === 0) return;
      io.send({ socket, endpoint: from }, encodeStunResponse({ ...asked, unknown }, { mapped: from }));
    },
  };
}

// ---------------------------------------------------------------------------------------------------- the machine

const SWEEP_INTERVAL_MS = 1_000;

/** Makes a server: all the rooms, and what goes from one to another. */
export function createServer(options: ServerOptions): Server {
  let effects: Effect<ServerEvent>[] = [], sweepAt = Infinity;
  const limits = createLimits(), directory = createDirectory<Session>();
  const io = {
    now: 0,
    random: options.random,
    allows: limits.allows,
    emit: (event: ServerEvent) => void effects.push({ kind: "event", event }),
    send: ({ socket, endpoint: to }: Address, data: Uint8Array) =>
      void effects.push({ kind: "send", socket, to, data }),
  };
  const ladder = createLadder(io, options, (...proved) => sessions.admit(...proved));
  const sessions = createSessions(io, options, directory, greet), { toClient } = sessions;
  const relay = createRelay(io, directory, sessions), list = createList(io, directory, sessions);
  const stun = createStun(io, options);

  /** WELCOME bears the id and the counter of the LOGIN, since it is only now that the client learns its token. */
  function greet(session: Session, { id, counter }: Login, at: Address, isNew: boolean): void {
    const { token, keys } = session, users = list.firstPage(), total = directory.size();
    const ports = { secondPort: stun.portOf(SECOND_PORT), thirdPort: stun.portOf(THIRD_PORT) };
    const welcome = { type: "WELCOME", token, public: at.endpoint, ...ports, total, users } as const;
    io.send(at, encode(welcome, { id, counter, key: keys.toClient }));
    if (isNew) list.announce(session, sessions.all());
  }

  /** In order of cost: what can be thrown away is thrown away before it costs more. */
  function receive(datagram: Datagram): void {
    const { data, socket, from } = datagram, at = { socket, endpoint: from };
    if (data[0]! < 4) return limits.mayAskStun(from) ? stun.answer(datagram) : undefined;
    const header = controlHeader(data), isLogin = data[1] === CONTROL.LOGIN.code;
    const session = header && !isLogin ? sessions.find(header.id) : undefined;
    if (!header || (session ? isSeen(session.window, header.counter) : !limits.isWorthDecoding(data))) return;
    const message = decode(data); // this, and the MAC, cost more than all that came before
    if (!message || !isFromClient(message.type)) return; // no answer to an answer: that would never end
    if (message.type === "LOGIN") return ladder.climb(message, at, data);
    if (!session) return ladder.challenge(at, message, 0);
    if (!sessions.hear(session, data, message.counter) || !io.allows(session.token, "datagrams")) return;
    serve(session, message, at);
    if (!isAt(session, from) && sessions.find(session.token)) ladder.challenge(at, message, 1);
  }

  function serve(session: Session, message: Control, at: Address): void {
    if (message.type === "LOGOUT") sessions.remove(session, "left");
    else if (message.type === "GETALLUSER") list.answer(session, message);
    else if (message.type === "P2PTRANS") relay.pass(session, message);
    else if (message.type === "PUNCHED") relay.punched(session, message);
    else if (message.type === "KEEPALIVE") {
      const hasMoved = !isAt(session, at.endpoint) && ladder.isCookieOf(at.endpoint, message.cookie);
      sessions.keepAlive(session, message, at, hasMoved);
    }
  }

  /** What the rooms have sent and told meanwhile. As long as they remember anything, there will be a sweep. */
  function effectsOf(act: () => void, now = io.now): Effect<ServerEvent>[] {
    effects = [];
    io.now = now;
    limits.setTime(now);
    act();
    if (sweepAt === Infinity && !(limits.isEmpty() && sessions.isEmpty())) sweepAt = now + SWEEP_INTERVAL_MS;
    return effects;
  }

  function sweep(): void {
    sweepAt = Infinity;
    limits.sweep();
    sessions.sweep();
  }

  return {
    opened: (socket, port, now) => effectsOf(() => stun.opened(socket, port), now),
    receive: (datagram, now) => effectsOf(() => receive(datagram), now),
    wake: (now) => now < sweepAt ? [] : effectsOf(sweep, now),
    wakeAt: () => sweepAt,
    stop: () => effectsOf(() => sessions.all().forEach((session) => toClient(session, { type: "LOGOUT" }))),
  };
}

// ---------------------------------------------------------------------------------------------------- command line

const USAGE = `The rendezvous server of Punch.

  deno run --allow-net server.ts [options]
  bun server.ts [options]

  --port N             UDP port (default ${DEFAULT_PORT})
  --host A             address to listen on (default ::, which is IPv4 too)
  --alt-port N         second UDP port (default the next one)
  --alt-host A         second address of this host, for a complete STUN service; wants --host
  --password-file F    nobody logs in without knowing what is in F (or in PUNCH_PASSWORD)
  --max-users N        most users at a time (default ${MAX_USERS})
  --max-per-address N  most users at a time from one /24 or IPv6 /48 (default ${MAX_PER_ADDRESS})
  --json               one JSON object a line on stdout
  --trace              every datagram on stderr
  --quiet              only errors
`;
const OPEN_TO_ALL =
  "Anybody may log in: no --password-file, and no PUNCH_PASSWORD (which Deno shows with --allow-env only)";
const LOG_LINES: Rate = { perSecond: 20, burst: 200 };
const GOODBYE_MS = 50; // long enough for the last datagrams to leave

async function main(): Promise<void> {
  const { parseArgs } = await import("deno-std@1.4.0/cli/parse_args.js");
  const unknown: string[] = [];
  const args = parseArgs(process.argv.slice(2), {
    string: ["port", "host", "alt-port", "alt-host", "password-file", "max-users", "max-per-address"],
    boolean: ["json", "trace", "quiet", "help"],
    unknown: (arg: string) => unknown.push(arg) < 0,
  });
  if (args.help) return void process.stdout.write(USAGE);
  const number = (name: "port" | "alt-port" | "max-users" | "max-per-address", most: number, otherwise: number) => {
    const value = args[name] === undefined ? otherwise : Number(args[name] || NaN);
    if (Number.isInteger(value) && value >= 0 && value <= most) return value;
    throw new UsageError(`--${name} wants a number of 0 to ${most}, not "${args[name]}"`);
  };
  if (unknown.length > 0) throw new UsageError(`Unknown argument "${unknown[0]}"`);
  const port = number("port", 65535, DEFAULT_PORT), altPort = number("alt-port", 65535, port === 0 ? 0 : port + 1);
  const maxUsers = number("max-users", 1e7, MAX_USERS);
  const maxPerAddress = number("max-per-address", 1e7, MAX_PER_ADDRESS);
  const host = args.host ?? "::", altHost = args["alt-host"];
  if (altHost !== undefined) {
    const [own, other] = [host, altHost].map((address) => addressBytes(address));
    if (!other?.some((byte) => byte !== 0)) {
      throw new UsageError(`--alt-host wants the IP address of an interface, not "${altHost}"`);
    }
    if (!own?.some((byte) => byte !== 0) || own.length !== other.length) {
      throw new UsageError(`--alt-host wants --host with this host's other IP address of that kind, not "${host}"`);
    }
    if (port === 0 || altPort === 0) throw new UsageError(`--alt-host wants --port and --alt-port to be other than 0`);
  }
  const password = await secretWords({ file: args["password-file"], variable: "PUNCH_PASSWORD", label: "password" });

  const mayLog = createLimit(LOG_LINES);
  const say = (event: ServerEvent) => {
    if (event.event !== "listening" && !mayLog(clock())) return;
    if (args.json) console.log(jsonLine(event));
    else if (!args.quiet) console.error(inWords(event));
  };
  const hosts: ServerOptions["hosts"] = altHost === undefined ? undefined : [host, altHost];
  const random = (length: number) => Uint8Array.from(randomBytes(length)), keys = generateKeys();
  const passwordKey = keyFromWords(password, "password");
  const server = createServer({ keys, random, password: passwordKey, maxUsers, maxPerAddress, hosts });
  const onDatagram = args.trace ? createTrace() : undefined;
  let address = host;
  const run = (host: string) => {
    address = host;
    const sockets = [{ host, port }, { host, port: altPort }, { host, port: 0 }];
    if (altHost !== undefined) sockets.push({ host: altHost, port }, { host: altHost, port: altPort });
    return listen(server, { sockets, onEvent: say, onDatagram });
  };
  const running = await listenOrFail(run, { host: args.host, json: args.json });
  if (!password && !args.json && !args.quiet) console.error(OPEN_TO_ALL);
  say({ event: "listening", address, port: running.ports[0]!, altPort: running.ports[1]! });
  const stop = () => {
    running.perform(server.stop());
    setTimeout(() => process.exit(0), GOODBYE_MS);
  };
  for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, stop);
}

function inWords(event: ServerEvent): string {
  if (event.event === "logout") return `${event.name} is gone (${event.reason})`;
  if (event.event !== "listening") {
    return `${event.name} is ${event.event === "login" ? "here," : "now"} at ${event.public}`;
  }
  const port = event.port === DEFAULT_PORT ? "" : `:${event.port}`;
  return `Listening on UDP port ${event.port} of ${event.address}. The others type:\n` +
    `  deno task client <address of this host>${port} <name>`;
}

if (import.meta.main) await main().catch(exitWith);
