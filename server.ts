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
 * @module
 */
import { randomBytes, timingSafeEqual } from "node:crypto";
import process from "node:process";
import { addressBytes, type Endpoint, formatEndpoint, hostOf, isIPv6, parseEndpoint, scopeOf } from "./protocol.ts";
import { hex, type Introduced, MAX_RELAYED_BYTES, MIN_CLIENT_BYTES, type NatClass, type User } from "./protocol.ts";
import { CONTROL, type Control, type ControlBody, controlHeader, decode, encode, isFromClient } from "./protocol.ts";
import { accept, isSeen, type ReplayWindow, replayWindow, sipHash, verifies } from "./protocol.ts";
import { controlKeys, diffieHellman, type KeyPair, loginKey, passwordProof, publicNonce } from "./protocol.ts";
import { conform, createLimit, type Limit, type Rate } from "./protocol.ts";
import { decodeStun, encodeStunResponse, STUN_CHANGE_REQUEST, STUN_RESPONSE_PORT } from "./protocol.ts";
import { type Datagram, type Effect, listen, listenOrFail, type Machine } from "./protocol.ts";
import { clock, createTrace, DEFAULT_PORT, exitWith, jsonLine, secretWords, UsageError, userName } from "./protocol.ts";
import { generateKeys, keyFromWords } from "./protocol.ts";

// ---------------------------------------------------------------------------------------------------- constants

/** A client that has been silent for so long has vanished: three of its keepalives are lost. */
const SILENCE_MS = 60_000;
/** How much longer the key of a vanished client that asked for it holds its name. */
const NAME_HELD_MS = 300_000;
/** How long a name that was here is called "offline" rather than "unknown". */
const REMEMBERED_MS = 3_600_000;
/** A cookie is valid in its epoch and the next one. */
const COOKIE_EPOCH_MS = 30_000;
const SWEEP_INTERVAL_MS = 1_000;
/** Most that the nearer of two peers waits with its punch: a client may have measured a round trip that is wrong. */
const MAX_PUNCH_DELAY_MS = 150;
/** A page of users ends after so many bytes: one more user (92 bytes at most) and the fields of WELCOME still fit. */
const PAGE_BYTES = 1040;
/** Pages sent in answer to one question; more would overflow the asker's socket buffer (92 full datagrams on Linux). */
const PAGES_PER_ANSWER = 16;
/** While so few are logged in, a newcomer is announced to all: then nobody has to ask before the first message. */
const ANNOUNCE_UP_TO = 16;

const MAX_USERS = 100_000, MAX_PER_ADDRESS = 2_000, MAX_REMEMBERED = 10_000, MAX_PREFIXES = 50_000;
const LOG_LINES: Rate = { perSecond: 20, burst: 200 };

/** Sockets 0, 1: our two ports; 2: a third, to which no client writes; 3, 4: the two ports of a second address. */
const SECOND_PORT = 1, THIRD_PORT = 2, SECOND_ADDRESS = 3;
/**
 * Which socket answers a STUN request that came in at socket 0, 1, ... (RFC 5780, section 6.1). Another port is the
 * third one, so that nobody who asks what his NAT lets in has ever written to where the answer comes from.
 */
const STUN_FROM = { same: [0, 1, 2, 3, 4], port: [2, 2, 0, 4, 3], address: [3, 4, 3, 0, 1], both: [4, 3, 4, 1, 0] };

// ---------------------------------------------------------------------------------------------------- types

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
  /** The address of sockets 0 to 2 and that of 3 and 4, if there is a second one. */ hosts?:
    | [string, string]
    | undefined;
}

/** A server without sockets. It wants 0: main port, 1: second port, 2: any port, and 3, 4: as 0, 1 at another address. */
export interface Server extends Machine<ServerEvent> {
  /** Tells all clients that the server is going. */
  stop(): Effect<ServerEvent>[];
}

/** An endpoint, and which of our sockets reaches it. */
interface Address {
  endpoint: Endpoint;
  socket: number;
}

interface Session {
  token: string; // index of the session, known to its client alone
  clock: number; // counter of its LOGIN: a LOGIN with an older one is a replay
  name: string;
  nonce: string; // by which other users know this login
  key: Uint8Array; // the client's X25519 public key
  keys: { toServer: Uint8Array; toClient: Uint8Array }; // of the MACs
  window: ReplayWindow; // which counters it has used
  sent: number; // the last counter that we have used
  home: Address; // where it has returned a cookie from: first with LOGIN, later with KEEPALIVE
  other: Address | null; // the same client in the other IP version; has returned a cookie too
  local: Endpoint[]; // what it takes its own addresses to be
  keepName: boolean; // whether its key holds the name for a while after it has vanished
  nat: NatClass; // what it takes its NAT to be
  rttMs: number; // its round trip to us, as it has measured it
  heardAt: number;
}

// ---------------------------------------------------------------------------------------------------- directory

/** Who is there, by name and in order of name. All that several servers would have to share. */
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
    all: () => byName.values(),
    put(entry: T) {
      if (!byName.has(entry.name)) names.splice(position(entry.name), 0, entry.name);
      byName.set(entry.name, entry);
    },
    remove(name: string) {
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

// ---------------------------------------------------------------------------------------------------- limits
//
// What strangers and users can have us do, and how much of it. A prefix stands for one customer of a provider: a /24 or,
// of IPv6, a /48; whose source address is forged may be no part of it.

/** What one session may ask for. */
const PER_SESSION = {
  datagrams: { perSecond: 2_000, burst: 5_000 }, // of all kinds; at this rate 131 bytes in each make 256 KiB a second
  calls: { perSecond: 20, burst: 100 },
  punches: { perSecond: 100, burst: 200 }, // what others' calls make a client say must not cost it its own calls
  moves: { perSecond: 1, burst: 10 },
  pages: { perSecond: 200, burst: 2_000 },
  relayedBytes: { perSecond: 256 * 1024, burst: 512 * 1024 },
  errors: { perSecond: 10, burst: 20 },
} satisfies Record<string, Rate>;
const LOGINS_PER_PREFIX: Rate = { perSecond: 50, burst: 2_000 };
/** Strangers altogether, with a cookie and without: what exceeds it in a flood is dropped unread, so that sessions are served. */
const STRANGERS: Rate = { perSecond: 5_000, burst: 5_000 };
// Only STUN has answers larger than the questions (1.6 times; 2.2 with IPv6, 2.8 and 4.6 with a second address), and it
// cannot ask for a cookie. Whoever forges a victim's address gets no more than this to it.
const STUN_PER_PREFIX: Rate = { perSecond: 50, burst: 400 }, MAX_STUN_PREFIXES = 10_000;
const STUN_WHEN_FULL: Rate = { perSecond: 200, burst: 200 }, STUN_ALTOGETHER: Rate = { perSecond: 2_000, burst: 2_000 };

/**
 * A limit for each key: one number, its theoretical arrival time (see `conform`). A time that has passed is as good as
 * none, so a sweep forgets it. Who comes when the table is full shares `whenFull` with all others who do.
 */
function createLimiter(rate: Rate, options: { maxKeys?: number; whenFull?: Limit } = {}) {
  const { maxKeys = Infinity, whenFull = () => false } = options;
  const times = new Map<string, number>();
  return {
    allows(key: string, now: number, cost = 1): boolean {
      const time = times.get(key);
      if (time === undefined && times.size >= maxKeys) return whenFull(now, cost);
      const next = conform(time ?? 0, rate, now, cost);
      if (next !== null) times.set(key, next);
      return next !== null;
    },
    sweep(now: number): void {
      for (const [key, time] of times) if (time <= now) times.delete(key);
    },
    size: () => times.size,
  };
}

/** All limits on what comes in. */
function createLimits() {
  let elapsed = 0, last: number | undefined;
  /** Counts on from 0 only: so no sum of its times is rounded, and nobody is locked out when the clock is set back. */
  function timeAt(now: number): number {
    elapsed += Math.max(0, now - (last ?? now));
    last = now;
    return elapsed;
  }
  const strangers = createLimit(STRANGERS), withCookie = createLimit(STRANGERS);
  const logins = createLimiter(LOGINS_PER_PREFIX, { maxKeys: MAX_PREFIXES });
  const stun = createLimiter(STUN_PER_PREFIX, { maxKeys: MAX_STUN_PREFIXES, whenFull: createLimit(STUN_WHEN_FULL) });
  const stunAltogether = createLimit(STUN_ALTOGETHER);
  const perSession = Object.fromEntries(
    Object.entries(PER_SESSION).map(([what, rate]) => [what, createLimiter(rate)]),
  ) as Record<keyof typeof PER_SESSION, ReturnType<typeof createLimiter>>;
  const limiters = [logins, stun, ...Object.values(perSession)];
  return {
    allows: ({ token }: Session, what: keyof typeof PER_SESSION, { now, cost }: { now: number; cost?: number }) =>
      perSession[what].allows(token, timeAt(now), cost),
    mayLogIn: (from: Endpoint, now: number) => logins.allows(prefixOf(from), timeAt(now)),
    /** A refusal is silence, as a lost datagram would be. */
    mayAskStun: (from: Endpoint, now: number) =>
      stun.allows(prefixOf(from), timeAt(now)) && stunAltogether(timeAt(now)),
    /** Strangers have a share of the server's time, and those who seem to bring a cookie back have one of their own. */
    isWorthDecoding(data: Uint8Array, now: number): boolean {
      if (data.length < MIN_CLIENT_BYTES) return false; // not even a cookie in answer: that could be larger
      // The cookie is the first field of LOGIN, behind the header of 16 bytes.
      const hasCookie = data[1] === CONTROL.LOGIN.code && data.subarray(16, 24).some((byte) => byte !== 0);
      return (hasCookie ? withCookie : strangers)(timeAt(now));
    },
    sweep: (now: number) => limiters.forEach((limiter) => limiter.sweep(timeAt(now))),
    isEmpty: () => limiters.every((limiter) => limiter.size() === 0),
  };
}

// ---------------------------------------------------------------------------------------------------- pure functions

/** The part of an address that one customer of a provider usually has to himself: IPv4 /24, IPv6 /48. */
function prefixOf(endpoint: Endpoint): string {
  const host = hostOf(endpoint);
  return isIPv6(endpoint) ? hex(addressBytes(host)!.subarray(0, 6)) : host.slice(0, host.lastIndexOf("."));
}

/** Where a session's client has shown that it receives: IPv4, IPv6 or both. */
const endpointsOf = ({ home, other }: Session) => other ? [home.endpoint, other.endpoint] : [home.endpoint];

/** Whether two sessions come from behind the same NAT: the same IPv4 address, or the same /64. */
function sameSite(one: Session, other: Session): boolean {
  const sitesOf = (session: Session) =>
    endpointsOf(session).map((endpoint) => hex(addressBytes(hostOf(endpoint))!.subarray(0, 8)));
  return sitesOf(one).some((site) => sitesOf(other).includes(site));
}

/** Where `viewer` may try to reach `subject`: what we have seen and, on the same site, the private addresses it named. */
function candidatesFor(subject: Session, viewer: Session): Endpoint[] {
  const isThisHost = scopeOf(hostOf(subject.home.endpoint)) === "loopback"; // then nothing is nearer than that
  const local = sameSite(subject, viewer) && !isThisHost
    ? subject.local.filter((endpoint) => scopeOf(hostOf(endpoint)) === "private")
    : [];
  return [...new Set([...local, ...endpointsOf(subject)])];
}

const asUser = ({ name, nonce, key, home }: Session): User => ({ name, nonce, key, public: home.endpoint });
/** Its size in a datagram: see `user` in protocol.ts. */
const userBytes = (session: Session) => 44 + Buffer.byteLength(session.name) + (isIPv6(session.home.endpoint) ? 16 : 4);

const sameKey = (one: Uint8Array, other: Uint8Array) => one.every((byte, i) => byte === other[i]);

// ---------------------------------------------------------------------------------------------------- machine

/** Makes a server. */
export function createServer(options: ServerOptions): Server {
  const { keys, random, password, maxUsers = MAX_USERS, maxPerAddress = MAX_PER_ADDRESS, hosts } = options;
  const cookieKey = random(16);
  const sessions = new Map<string, Session>();
  const directory = createDirectory<Session>();
  /** Names that were here; `key` still holds its name until `heldUntil`, and a LOGIN of old may come again. */
  const formerUsers = new Map<
    string,
    Record<"clock" | "heldUntil" | "replayUntil" | "forgetAt", number> & Pick<User, "key">
  >();
  /** Logins whose cookie is still good: when it will not be. */
  const usedLoginIds = new Map<string, number>();
  /** How many users each prefix has. */
  const usersAt = new Map<string, number>();
  /** Of our sockets; 0: not open. */
  const ports = [0, 0, 0, 0, 0];
  const limits = createLimits(), { allows } = limits;
  let sweepAt = Infinity;

  // -- STUN: how a stranger's endpoint looks from here

  function answerStun({ socket, from, data }: Datagram, now: number): Effect<ServerEvent>[] {
    if (!limits.mayAskStun(from, now)) return []; // before anything that costs more
    const asked = decodeStun(data);
    if (asked?.kind !== "request" || !parseEndpoint(from)) return [];
    const endpoint = (socket: number) =>
      hosts && formatEndpoint(hosts[socket < SECOND_ADDRESS ? 0 : 1], ports[socket]!);
    const change = asked.changeIp ? asked.changePort ? "both" : "address" : asked.changePort ? "port" : "same";
    const answerer = STUN_FROM[change][socket]!;
    const missing = [...asked.unknown];
    if (asked.responsePort && !hosts) missing.push(STUN_RESPONSE_PORT);
    if (ports[answerer] === 0) missing.push(STUN_CHANGE_REQUEST);
    if (missing.length === 0) {
      // Another port of the asker's own: whoever can forge his address could have named that port as well.
      const to = asked.responsePort ? formatEndpoint(hostOf(from), asked.responsePort) : from;
      const answer = { mapped: from, origin: endpoint(answerer), other: endpoint(STUN_FROM.both[socket]!) };
      return [{ kind: "send", socket: answerer, to, data: encodeStunResponse(asked, answer) }];
    }
    // Without that socket it is an error, not silence, which would look like a NAT that filters (RFC 5780, section 6.1).
    // A classic client takes whatever comes in for the answer that it hopes for: there silence errs to the safe side.
    if (asked.classic && asked.unknown.length === 0) return [];
    const refusal = encodeStunResponse({ ...asked, unknown: missing }, { mapped: from });
    return [{ kind: "send", socket, to: from, data: refusal }];
  }

  // -- cookies: what shows that somebody receives at an address, without our keeping anything

  function cookieOf(endpoint: Endpoint, epoch: number): string {
    return hex(sipHash(cookieKey, Buffer.from(`${epoch} ${endpoint}`)));
  }

  function isCookieOf(endpoint: Endpoint, cookie: string, now: number): boolean {
    const epoch = Math.floor(now / COOKIE_EPOCH_MS);
    return [epoch, epoch - 1].some((epoch) => cookieOf(endpoint, epoch) === cookie);
  }

  /** The only answer that a stranger gets; never larger than the question, which MIN_CLIENT_BYTES sees to. */
  function challenge({ socket, from }: Datagram, asked: Control, known: boolean, now: number): Effect<ServerEvent> {
    const cookie = cookieOf(from, Math.floor(now / COOKIE_EPOCH_MS));
    const message = { type: "COOKIE", cookie, key: keys.public, known: Number(known) } as const;
    return { kind: "send", socket, to: from, data: encode(message, asked) };
  }

  // -- sessions

  function toClient(session: Session, message: ControlBody, to: Address = session.home): Effect<ServerEvent> {
    const data = encode(message, { id: session.token, counter: ++session.sent, key: session.keys.toClient });
    return { kind: "send", socket: to.socket, to: to.endpoint, data };
  }

  function refuse(session: Session, reason: string, about: string, now: number): Effect<ServerEvent>[] {
    if (!allows(session, "errors", { now })) return [];
    return [toClient(session, { type: "ERROR", reason, about, seconds: 0 })];
  }

  function remove(session: Session, reason: "left" | "vanished" | "replaced", now: number): Effect<ServerEvent>[] {
    sessions.delete(session.token);
    directory.remove(session.name);
    countUser(session.home, -1);
    if (reason !== "replaced") {
      const held = reason === "vanished" && session.keepName;
      if (formerUsers.size >= MAX_REMEMBERED) {
        const free = formerUsers.entries().find(([, { heldUntil }]) => heldUntil <= now); // the oldest; held only if all are
        formerUsers.delete(free ? free[0] : formerUsers.keys().next().value!);
      }
      formerUsers.set(session.name, {
        key: session.key,
        clock: session.clock,
        heldUntil: held ? now + NAME_HELD_MS : now,
        replayUntil: now + 2 * COOKIE_EPOCH_MS,
        forgetAt: now + REMEMBERED_MS,
      });
    }
    return [{ kind: "event", event: { event: "logout", name: session.name, reason } }];
  }

  /** The client receives there now; nothing happens if that address has no room, or if it is a new one all the time. */
  function move(session: Session, to: Address, now: number): Effect<ServerEvent>[] {
    if (isIPv6(to.endpoint) !== isIPv6(session.home.endpoint)) {
      session.other = to;
      return [];
    }
    const stays = prefixOf(to.endpoint) === prefixOf(session.home.endpoint);
    if (!stays && !(hasRoom(to.endpoint) && allows(session, "moves", { now }))) return [];
    countUser(session.home, -1);
    session.home = to;
    countUser(session.home, 1);
    return [{ kind: "event", event: { event: "moved", name: session.name, public: to.endpoint } }];
  }

  function hasRoom(endpoint: Endpoint): boolean {
    const users = usersAt.get(prefixOf(endpoint));
    return users === undefined ? usersAt.size < MAX_PREFIXES : users < maxPerAddress;
  }

  function countUser({ endpoint }: Address, change: 1 | -1): void {
    const prefix = prefixOf(endpoint), users = (usersAt.get(prefix) ?? 0) + change;
    if (users > 0) usersAt.set(prefix, users);
    else usersAt.delete(prefix);
  }

  // -- login

  function login(message: Control & { type: "LOGIN" }, datagram: Datagram, now: number): Effect<ServerEvent>[] {
    const { socket, from, data } = datagram;
    if (!isCookieOf(from, message.cookie, now)) return [challenge(datagram, message, false, now)];
    if (!limits.mayLogIn(from, now)) return [];
    const shared = diffieHellman(keys.secret, message.key);
    if (!shared || !verifies(data, loginKey(shared, message.id))) return [];

    const deny = (reason: string, seconds = 0): Effect<ServerEvent>[] => {
      const answer = { type: "ERROR", reason, about: message.name, seconds } as const;
      const seal = { id: message.id, counter: message.counter, key: loginKey(shared, message.id) };
      return [{ kind: "send", socket, to: from, data: encode(answer, seal) }];
    };
    if (userName(message.name) !== message.name) return deny("bad-name");
    if (password) {
      const proof = Buffer.from(passwordProof(shared, { password, id: message.id }));
      if (!timingSafeEqual(proof, Buffer.from(message.proof))) return deny("bad-password");
    }
    const holder = directory.find(message.name), former = formerUsers.get(message.name); // never both
    const last = holder ?? former, isSame = last !== undefined && sameKey(last.key, message.key);
    const nonce = publicNonce(message.id), at = { endpoint: from, socket };
    if (holder && isSame && holder.nonce === nonce) { // our WELCOME was lost; who has had it would not ask from elsewhere
      const isElsewhere = from !== holder.home.endpoint && holder.window.highest < 0;
      return [...isElsewhere ? move(holder, at, now) : [], welcome(holder, message, at)];
    }
    const nameFreeAt = holder ? holder.heardAt + SILENCE_MS : former?.[isSame ? "replayUntil" : "heldUntil"] ?? 0;
    const isNewer = isSame && message.counter > last.clock; // else it may be a replay
    const seconds = Math.max(0, Math.ceil((nameFreeAt - now) / 1000));
    if (!isNewer && (holder || nameFreeAt > now)) return deny("name-taken", seconds);
    if (usedLoginIds.has(message.id)) return deny("name-taken"); // a replay, after others have had the name
    const stays = holder && prefixOf(holder.home.endpoint) === prefixOf(from);
    if ((!holder && directory.size() >= maxUsers) || (!stays && !hasRoom(from))) return deny("full");

    const replaced = holder ? remove(holder, "replaced", now) : [];
    const token = hex(random(8));
    const session: Session = {
      token,
      clock: message.counter,
      name: message.name,
      nonce,
      key: message.key,
      keys: controlKeys(shared, token),
      window: replayWindow(),
      sent: message.counter,
      home: at,
      other: null,
      local: message.local,
      keepName: message.keepName === 1,
      nat: { mapping: "unknown", filtering: "unknown", allocation: "unknown" },
      rttMs: message.rttMs,
      heardAt: now,
    };
    sessions.set(token, session);
    directory.put(session);
    formerUsers.delete(session.name);
    if (usedLoginIds.size >= MAX_USERS) usedLoginIds.delete(usedLoginIds.keys().next().value!);
    usedLoginIds.set(message.id, now + 2 * COOKIE_EPOCH_MS);
    countUser(at, 1);
    return [
      ...replaced,
      { kind: "event", event: { event: "login", name: session.name, public: from } },
      welcome(session, message, at),
      ...announce(session),
    ];
  }

  function welcome({ token, keys }: Session, { id, counter }: Control, at: Address): Effect<ServerEvent> {
    const message = {
      type: "WELCOME",
      token,
      public: at.endpoint,
      secondPort: ports[SECOND_PORT]!,
      thirdPort: ports[THIRD_PORT]!,
      total: directory.size(),
      users: page(directory.after("", "")),
    } as const;
    const data = encode(message, { id, counter, key: keys.toClient });
    return { kind: "send", socket: at.socket, to: at.endpoint, data };
  }

  function announce(session: Session): Effect<ServerEvent>[] {
    const total = directory.size();
    if (total > ANNOUNCE_UP_TO) return [];
    const users = [asUser(session)];
    return [...directory.all()].filter((other) => other !== session).map((other) =>
      toClient(other, { type: "USERS", asked: 0, page: 0, last: 0, more: 0, total, users })
    );
  }

  // -- the list of users

  /** As many of them as fit into one datagram. */
  function page(entries: Generator<Session>): User[] {
    const users: User[] = [];
    for (let room = PAGE_BYTES; room > 0;) {
      const { value: session, done } = entries.next();
      if (done) break;
      room -= userBytes(session);
      users.push(asUser(session));
    }
    return users;
  }

  function list(session: Session, asked: Control & { type: "GETALLUSER" }, now: number): Effect<ServerEvent>[] {
    const entries = directory.after(asked.prefix, asked.after);
    const pages: User[][] = [page(entries)];
    while (pages.at(-1)!.length > 0 && pages.length < PAGES_PER_ANSWER) pages.push(page(entries));
    const more = Number(pages.at(-1)!.length > 0);
    if (!more && pages.length > 1) pages.pop();
    if (!allows(session, "pages", { cost: pages.length, now })) return refuse(session, "busy", "", now);
    const total = directory.size(), last = pages.length - 1;
    return pages.map((users, page) =>
      toClient(session, { type: "USERS", asked: asked.counter, page, last, more, total, users })
    );
  }

  // -- introductions and relay

  function introduction(subject: Session, viewer: Session): Introduced {
    // Both hear of each other at the same instant of ours; the nearer one waits until the other can have heard too.
    const punchAfterMs = Math.min(MAX_PUNCH_DELAY_MS, Math.max(0, (subject.rttMs - viewer.rttMs) >> 1));
    const { name, nonce, key, nat } = subject;
    return { name, nonce, key, candidates: candidatesFor(subject, viewer), nat, punchAfterMs };
  }

  function relay(session: Session, message: Control & { type: "P2PTRANS" }, now: number): Effect<ServerEvent>[] {
    const target = directory.find(message.to);
    if (!target) return refuse(session, formerUsers.has(message.to) ? "offline" : "unknown", message.to, now);
    const cost = message.body.length;
    if (cost > MAX_RELAYED_BYTES) return refuse(session, "too-long", message.to, now);
    if (!allows(session, "relayedBytes", { cost, now })) return refuse(session, "busy", message.to, now);
    const isCurrent = message.nonce === target.nonce; // else it is sealed for a login of old: nobody could open it
    if (isCurrent && !message.call) {
      return [toClient(target, { type: "RELAYED", from: session.name, nonce: session.nonce, body: message.body })];
    }
    if (!allows(session, "calls", { now })) return refuse(session, "busy", message.to, now);
    const body = isCurrent ? message.body : new Uint8Array(0);
    return [
      toClient(target, { type: "P2PSOMEONEWANTTOCALLYOU", peer: introduction(session, target), body }),
      toClient(session, { type: "INTRODUCTION", peer: introduction(target, session) }),
    ];
  }

  // -- events in, effects out

  function hear(session: Session, message: Control, datagram: Datagram, now: number): Effect<ServerEvent>[] {
    switch (message.type) {
      case "LOGOUT":
        return remove(session, "left", now);
      case "GETALLUSER":
        return list(session, message, now);
      case "P2PTRANS":
        return relay(session, message, now);
      case "PUNCHED": {
        const target = directory.find(message.peer);
        if (!target || !allows(session, "punches", { now })) return [];
        return [toClient(target, { type: "PUNCHED", peer: session.name })];
      }
      case "KEEPALIVE": {
        const at: Address = { endpoint: datagram.from, socket: datagram.socket };
        const isKnown = endpointsOf(session).includes(at.endpoint);
        const moved = !isKnown && isCookieOf(at.endpoint, message.cookie, now);
        session.rttMs = message.rttMs;
        session.nat = message.nat;
        session.local = message.local;
        const events = moved ? move(session, at, now) : [];
        if (!endpointsOf(session).includes(at.endpoint)) return events;
        return [...events, toClient(session, { type: "ALIVE", asked: message.counter, public: at.endpoint }, at)];
      }
      default:
        return [];
    }
  }

  function receive(datagram: Datagram, now: number): Effect<ServerEvent>[] {
    if (datagram.data[0]! < 4) return answerStun(datagram, now);
    const header = controlHeader(datagram.data), isLogin = datagram.data[1] === CONTROL.LOGIN.code;
    const session = header && !isLogin ? sessions.get(header.id) : undefined;
    if (!header || (session ? isSeen(session.window, header.counter) : !limits.isWorthDecoding(datagram.data, now))) {
      return [];
    }
    const message = decode(datagram.data); // this, and the MAC, cost more than all that came before
    if (!message || !isFromClient(message.type)) return []; // no answer to an answer: that would never end
    if (message.type === "LOGIN") return login(message, datagram, now);
    if (!session) return [challenge(datagram, message, false, now)];
    if (!verifies(datagram.data, session.keys.toServer) || !accept(session.window, message.counter)) return [];
    session.heardAt = now;
    if (!allows(session, "datagrams", { now })) return [];
    const effects = hear(session, message, datagram, now);
    const isKnown = endpointsOf(session).includes(datagram.from);
    if (!isKnown && sessions.has(session.token)) effects.push(challenge(datagram, message, true, now));
    return effects;
  }

  const isEmpty = () => limits.isEmpty() && [sessions, formerUsers, usedLoginIds].every(({ size }) => size === 0);

  return {
    opened(socket, port) {
      ports[socket] = port;
      return [];
    },
    receive(datagram, now) {
      const effects = receive(datagram, now);
      if (sweepAt === Infinity && !isEmpty()) sweepAt = now + SWEEP_INTERVAL_MS;
      return effects;
    },
    wake(now) {
      if (now < sweepAt) return [];
      sweepAt = now + SWEEP_INTERVAL_MS;
      for (const [name, { forgetAt }] of formerUsers) if (forgetAt <= now) formerUsers.delete(name);
      for (const [id, forgetAt] of usedLoginIds) if (forgetAt <= now) usedLoginIds.delete(id);
      limits.sweep(now);
      const vanished = [...directory.all()].filter(({ heardAt }) => now - heardAt >= SILENCE_MS);
      const effects = vanished.flatMap((session) => remove(session, "vanished", now));
      if (isEmpty()) sweepAt = Infinity;
      return effects;
    },
    wakeAt: () => sweepAt,
    stop: () => [...directory.all()].map((session) => toClient(session, { type: "LOGOUT" })),
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
  const port = number("port", 65535, DEFAULT_PORT);
  const altPort = number("alt-port", 65535, port === 0 ? 0 : port + 1);
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
  const server = createServer({
    keys: generateKeys(),
    random: (length) => Uint8Array.from(randomBytes(length)),
    password: keyFromWords(password, "password"),
    maxUsers,
    maxPerAddress,
    hosts: altHost === undefined ? undefined : [host, altHost],
  });
  const onDatagram = args.trace ? createTrace() : undefined;
  let address = host;
  const run = (host: string) => {
    address = host;
    const sockets = [{ host, port }, { host, port: altPort }, { host, port: 0 }];
    if (altHost !== undefined) sockets.push({ host: altHost, port }, { host: altHost, port: altPort });
    return listen(server, { sockets, onEvent: say, onDatagram });
  };
  const running = await listenOrFail(run, { host: args.host, json: args.json });
  if (!password && !args.json && !args.quiet) {
    console.error(
      "Anybody may log in: no --password-file, and no PUNCH_PASSWORD (which Deno shows with --allow-env only)",
    );
  }
  say({ event: "listening", address, port: running.ports[0]!, altPort: running.ports[1]! });
  const stop = () => {
    running.perform(server.stop());
    setTimeout(() => {
      running.close();
      process.exit(0);
    }, GOODBYE_MS);
  };
  for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, stop);
}

/** Long enough for the last datagrams to leave. */
const GOODBYE_MS = 50;

function inWords(event: ServerEvent): string {
  if (event.event === "listening") {
    const port = event.port === DEFAULT_PORT ? "" : `:${event.port}`;
    return `Listening on UDP port ${event.port} of ${event.address}. The others type:\n` +
      `  deno task client <address of this host>${port} <name>`;
  }
  if (event.event === "logout") return `${event.name} is gone (${event.reason})`;
  return event.event === "login"
    ? `${event.name} is here, at ${event.public}`
    : `${event.name} is now at ${event.public}`;
}

if (import.meta.main) await main().catch(exitWith);
