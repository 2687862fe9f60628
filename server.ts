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
import {
  hex,
  type Introduced,
  keep,
  MAX_NAME_BYTES,
  MAX_RELAYED_BYTES,
  MIN_CLIENT_BYTES,
  userName,
} from "./protocol.ts";
import { accept, isSeen, type ReplayWindow, replayWindow, sipHash, verifies } from "./protocol.ts";
import { controlKeys, diffieHellman, fingerprintOf, type KeyPair, loginKey, passwordProof } from "./protocol.ts";
import { publicNonce, withPassword } from "./protocol.ts";
import { conform, createLimit, generateKeys, keyFromWords, type NatClass, type Rate, type User } from "./protocol.ts";
import { decodeStun, encodeStunResponse, STUN_CHANGE_REQUEST, STUN_RESPONSE_PORT } from "./protocol.ts";
import { type Datagram, type Effect, listen, listenOrFail, type Machine, VERSION } from "./protocol.ts";
import { createLog, DEFAULT_PORT, exitWith, identityIn, jsonLine, openTrace } from "./protocol.ts";
import { readArguments, secretWords, tellInvisible, UsageError } from "./protocol.ts";

// ---------------------------------------------------------------------------------------------------- options, events

/** What the server tells its operator. */
export type ServerEvent =
  | ListeningEvent
  | { event: "login" | "moved"; name: string; public: Endpoint }
  | { event: "logout"; name: string; reason: "left" | "vanished" | "replaced" }
  | { event: "refused"; name: string; public: Endpoint; reason: "bad-password" };

/** The server is at work. */
export interface ListeningEvent {
  /** The name of the event. */ event: "listening";
  /** The address that was asked for. */ address: string;
  /** The UDP port. */ port: number;
  /** The second UDP port. */ altPort: number;
  /** Of its key; see `fingerprintOf`. */ fingerprint: string;
  /** Whether it has the same key when it is started again. */ kept: boolean;
  /** Whether it asks for a password. */ password: boolean;
  /** Never: secrets are between clients. */ secret: false;
}

/** What the server is made of; everything random comes in here. */
export interface ServerOptions {
  /** The server's own keys. */ keys: KeyPair;
  /** Whether it has the same keys when it is started again. */ keepsKeys?: boolean | undefined;
  /** So many unpredictable bytes. */ random: (length: number) => Uint8Array;
  /** scrypt of the password, salted with the public key, if one is asked for. */ password?: Uint8Array | undefined;
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
  limits: Limits;
  emit(event: ServerEvent): void;
  send(to: Address, data: Uint8Array): void;
}

/** An endpoint, and which of our sockets reaches it. */
type Address = { endpoint: Endpoint; socket: number };

/** The first so many bytes of an address. */
const startOf = (endpoint: Endpoint, bytes: number) => hex(addressBytes(hostOf(endpoint))!.subarray(0, bytes));
/** The part of an address that one customer of a provider usually has to himself: IPv4 /24, IPv6 /48. */
const prefixOf = (endpoint: Endpoint) => startOf(endpoint, isIPv6(endpoint) ? 6 : 3);
/** What one provider usually has: IPv4 /16, IPv6 /32. */
const providerOf = (endpoint: Endpoint) => startOf(endpoint, isIPv6(endpoint) ? 4 : 2);

const utf8 = new TextEncoder();

// ---------------------------------------------------------------------------------------------------- the login ladder
//
// Whoever wants to log in climbs this ladder. Each rung tells us more about the client and costs us more than the one
// before, so that nobody makes us work hard without working himself. The ladder does not know who is logged in.
//
//     rung                                         now we know that the client ...           it has cost us
//     65 bytes                                     (nothing)                                 a look at them
//     the cookie, a MAC over its endpoint          receives where it says it is              2 SipHashes, no memory
//     its prefix has a share left                  is not one of thousands                   another one
//     MAC under the key that both agree on         owns the public key in its LOGIN          an X25519
//     proof of the password, if there is one       has been told the password                an HKDF
//     nobody else has the name, see `claim`        may have it                               a session
//
// Without a cookie one draws a COOKIE, no larger than the question, out of the share that strangers of its prefix have.

/** A cookie is valid in its epoch and in the next one. For so long others can repeat a LOGIN that they have seen. */
const COOKIE_EPOCH_MS = 30_000, COOKIE_LIFE_MS = 2 * COOKIE_EPOCH_MS;
/** What a LOGIN costs its prefix, in logins, if its MAC is wrong: an honest client's never is. */
const FALSE_LOGIN = 20;
const REFUSALS: Rate = { perSecond: 1, burst: 20 }; // that are told to the operator
const COOKIE_AT = 16; // it is the first field of LOGIN, behind the header

type Login = Control & { type: "LOGIN" };
type Refusal = { reason: string; seconds: number }; // after which to ask again makes sense; 0: nobody knows
type Admit = (login: Login, at: Address, agreed: Uint8Array) => Refusal | undefined;

function createLadder(io: Io, { keys, password }: ServerOptions, admit: Admit) {
  const cookieKey = io.random(16), mayTell = createLimit(REFUSALS);

  function cookieOf(endpoint: Endpoint, epochsAgo: 0 | 1): string {
    const epoch = Math.floor(io.now / COOKIE_EPOCH_MS) - epochsAgo;
    return hex(sipHash(cookieKey, utf8.encode(`${epoch} ${endpoint}`)));
  }
  const isCookieOf = (endpoint: Endpoint, cookie: string) =>
    cookie === cookieOf(endpoint, 0) || cookie === cookieOf(endpoint, 1);

  /** The only answer that a stranger gets; never larger than the question, which MIN_CLIENT_BYTES sees to. */
  function challenge(at: Address, asked: Control, isKnown = false): void {
    const terms = { version: VERSION, flag: isKnown };
    io.send(at, encode({ type: "COOKIE", cookie: cookieOf(at.endpoint, 0), key: keys.public, terms }, asked));
  }

  function meet(at: Address, data: Uint8Array): void { // somebody who has no session, or cannot show it
    if (!io.limits.mayBeStranger(at.endpoint)) return;
    const message = decode(data);
    if (message && isFromClient(message.type)) challenge(at, message); // an answer to an answer would never end
  }

  function climb(at: Address, data: Uint8Array): void {
    const cookie = hex(data.subarray(COOKIE_AT, COOKIE_AT + 8));
    if (cookie === NO_COOKIE || !isCookieOf(at.endpoint, cookie)) return meet(at, data);
    const prefix = io.limits.keyOf(prefixOf(at.endpoint));
    if (!io.limits.mayLogIn(prefix)) return;
    const login = decode(data);
    if (login?.type !== "LOGIN") return;
    const { id, counter, name } = login, shared = diffieHellman(keys.secret, login.key);
    const key = shared && loginKey(shared, id);
    if (!key || !verifies(data, key)) return io.limits.punish(prefix, FALSE_LOGIN - 1);
    const agreed = password ? withPassword(shared, password) : shared;
    const refusal = objection(login, at, agreed) ?? admit(login, at, agreed);
    if (refusal) io.send(at, encode({ type: "ERROR", about: name, ...refusal }, { id, counter, key }));
  }

  /** What is wrong with a LOGIN, whoever has the name. */
  function objection({ id, name, proof, terms }: Login, at: Address, agreed: Uint8Array): Refusal | undefined {
    if (terms.version !== VERSION) return { reason: `update-to-version-${VERSION}`, seconds: 0 };
    if (userName(name) !== name) return { reason: "bad-name", seconds: 0 };
    const right = password ? passwordProof(agreed, id) : NO_PROOF;
    if (timingSafeEqual(utf8.encode(right), utf8.encode(proof))) return;
    if (!password) return { reason: "no-password", seconds: 0 }; // a client that has one takes nothing from us
    if (mayTell(io.now)) io.emit({ event: "refused", name, public: at.endpoint, reason: "bad-password" });
    return { reason: "bad-password", seconds: 0 };
  }

  return { climb, meet, challenge, isCookieOf };
}

// ---------------------------------------------------------------------------------------------------- places
//
//     what has happened                                 what it shows
//     a COOKIE's cookie has come back from an endpoint  somebody receives there: it is a place
//     a KEEPALIVE has returned the last ALIVE's cookie  he still does; the next ALIVE has another one
//     nothing of that for 60 s                          nothing: nothing more is sent there
//
// A place is an endpoint at which a client receives. A source address can be forged, and a client that has left may go
// on speaking in the name of where it was: so what comes from a place does not show that anybody receives there, only
// what had to be received there does (as in QUIC, RFC 9000, section 9.3, and with ICE's consent, RFC 7675). Nobody draws
// more than 64 KiB to where he no longer is, however many sessions he has there. The room knows no messages.

const CONSENT_MS = 60_000; // so long after the last proof a place is good: three keepalives
const MAX_UNPROVED_BYTES = 64 * 1024; // most that goes there between two proofs beyond what has come from there
/** A place that so much has gone to since the last proof is asked for one, and again after each so many more bytes. */
const ASK_FROM_BYTES = 16 * 1024, ASK_EACH_BYTES = 8 * 1024;
/** When so little is left that only questions go, one a second is asked. */
const ASK_RESERVE_BYTES = 1_024, ASK_AGAIN_MS = 1_000;
/** Those whom a client does not know leave so much of it to others. */
const STRANGERS_BYTES = MAX_UNPROVED_BYTES / 2;
const MAX_LEFT_PLACES = 10_000; // that no session is at any more, and where what went counts on

const newPlace = (endpoint: Endpoint, prefix: Key) => ({
  endpoint,
  socket: 0,
  prefix,
  parts: [prefixOf(endpoint), providerOf(endpoint)] as readonly [prefix: string, provider: string],
  cookie: "", // that the next KEEPALIVE from there must return
  spent: [] as string[], // the last two of a COOKIE that came back, as two are valid: they prove nothing twice
  provedAt: 0,
  bytes: 0, // that went there since, beyond those that came from there
  asked: { bytes: 0, at: 0 }, // for a proof, since the last one: after how many bytes, and when
  sessions: new Set<Session>(), // whose client receives there
});
type Place = ReturnType<typeof newPlace>;

function createPlaces(io: Io, onLost: (place: Place, session: Session) => void) {
  const places = new Map<Endpoint, Place>(); // the one first that was proved the longest time ago
  const left = new Map<Endpoint, Place>(); // those without a session
  const prefixes = new Map<string, number>(); // in which there are places, and how many

  function prove(place: Place): void {
    place.provedAt = io.now;
    place.bytes = 0;
    place.asked = { bytes: 0, at: 0 };
    place.cookie = hex(io.random(8));
    places.delete(place.endpoint);
    places.set(place.endpoint, place);
  }

  const isLive = ({ provedAt }: Place) => io.now - provedAt < CONSENT_MS;

  function countPlace({ parts: [prefix] }: Place, change: 1 | -1): void {
    const count = (prefixes.get(prefix) ?? 0) + change;
    if (count > 0) prefixes.set(prefix, count);
    else prefixes.delete(prefix);
  }

  return {
    isLive,
    isPrefix: (endpoint: Endpoint) => prefixes.has(prefixOf(endpoint)),
    /** Somebody has brought a COOKIE's cookie from there, and has a session. */
    enter(session: Session, { endpoint, socket }: Address, loginCookie: string): Place {
      const place = places.get(endpoint) ?? left.get(endpoint) ??
        newPlace(endpoint, io.limits.keyOf(prefixOf(endpoint)));
      place.socket = socket;
      left.delete(endpoint);
      places.set(endpoint, place);
      if (!place.spent.includes(loginCookie)) {
        prove(place);
        place.spent = [loginCookie, ...place.spent.slice(0, 1)];
      }
      if (place.sessions.size === 0) countPlace(place, 1);
      place.sessions.add(session);
      return place;
    },
    leave(session: Session, place: Place): void {
      if (!place.sessions.delete(session) || place.sessions.size > 0) return;
      places.delete(place.endpoint);
      countPlace(place, -1);
      if (!isLive(place)) return;
      if (left.size >= MAX_LEFT_PLACES) left.delete(left.keys().next().value!);
      left.set(place.endpoint, place);
    },
    /** Whether that shows that somebody receives there now. */
    isProof(place: Place, cookie: string): boolean {
      const isRight = cookie === place.cookie;
      if (isRight) prove(place);
      return isRight;
    },
    /** Sends, unless too much has gone there, or nobody may be there any more; true: now a proof is wanted. */
    send(place: Place, data: Uint8Array): boolean {
      if (!isLive(place)) return false;
      const { asked } = place, fits = place.bytes + data.length <= MAX_UNPROVED_BYTES - ASK_RESERVE_BYTES;
      if (fits) {
        place.bytes += data.length;
        io.send(place, data);
      }
      const isWanted = fits
        ? place.bytes >= Math.max(ASK_FROM_BYTES, asked.bytes + ASK_EACH_BYTES)
        : io.now >= asked.at + ASK_AGAIN_MS;
      if (isWanted) place.asked = { bytes: place.bytes, at: io.now };
      return isWanted;
    },
    /** Asks for a proof; that counts too. */
    ask(place: Place, data: Uint8Array): void {
      if (place.bytes + data.length > MAX_UNPROVED_BYTES) return;
      place.bytes += data.length;
      io.send(place, data);
    },
    /** Gives up places where nobody has shown for long that he is there: at most so many. True: those were all. */
    sweep(most: number): boolean {
      for (const [endpoint, place] of left) if (!isLive(place)) left.delete(endpoint);
      for (const place of places.values()) {
        if (isLive(place)) return true;
        for (const session of place.sessions) {
          if (most-- <= 0) return false;
          onLost(place, session);
        }
      }
      return true;
    },
    isEmpty: () => places.size + left.size === 0,
  };
}

// ---------------------------------------------------------------------------------------------------- sessions
//
// A session is a client that has a name, and a place or two at which it receives, one in each IP version. The sessions
// do not know how a login is proved, nor what the clients have to say to each other.
//
//     LOGIN --claim--> session ---- LOGOUT, or no place for 60 s ----> former user ---- 1 h ----> forgotten
//                       |   ^                                             |
//                       +---+ KEEPALIVE with a cookie: it has moved       +--claim--> session

const NAME_HELD_MS = 300_000; // for so much longer the key of a vanished client that asked for it holds the name
const MAX_USERS = 100_000, MAX_PER_ADDRESS = 2_000;
/** Most of all users that one provider's may be on a large server: nobody with an IPv6 /32 can keep all others out. */
const PROVIDER_SHARE = 0.5;
const MAX_FRIENDS = 64; // whom a client has called: other callers do not use up what these may do

interface Session {
  token: string; // index of the session, known to its client alone
  key: Uint8Array; // the client's X25519 public key
  limit: Key; // of this session alone
  clock: number; // the counter of its LOGIN, which is the client's clock
  name: string;
  nonce: string; // by which other users know this login; the id in LOGIN is a secret
  keys: { toServer: Uint8Array; toClient: Uint8Array }; // of the MACs
  window: ReplayWindow; // which counters the client has used
  sent: number; // the last counter that we have used
  home: Place; // where the client has returned a cookie from: with LOGIN, or later with KEEPALIVE
  other: Place | null; // the same in the other IP version
  local: Endpoint[]; // what the client takes its own addresses to be
  keepName: boolean; // whether its key holds the name when it has vanished
  isHidden: boolean; // nobody is to be told where it is
  nat: NatClass; // what the client takes its NAT to be
  rttMs: number; // its round trip to us, as it has measured it
  keyText: string; // its hex digits
  friends: Set<string>; // keys of those whom the client knows, the one first whom it has called the longest time ago
}
type Claim = "new" | "again" | "replaces" | { refusedFor: number }; // seconds

const UNKNOWN_NAT: NatClass = { mapping: "unknown", filtering: "unknown", allocation: "unknown" };
const NO_COOKIE = "0".repeat(16), NO_PROOF = NO_COOKIE;
const NOWHERE = newPlace("0.0.0.0:1", [0, 0]); // of a session that is being made
const sameKey = (one: Uint8Array, other: Uint8Array) => one.every((byte, i) => byte === other[i]);

type Sessions = ReturnType<typeof createSessions>;
type Greet = (session: Session, login: Login, isNew: boolean, place?: Place) => void;
function createSessions(
  io: Io,
  options: ServerOptions,
  directory: Directory,
  on: { greet: Greet; ask(session: Session, place: Place): void }, // ask: the place wants a proof
) {
  const { maxUsers = MAX_USERS, maxPerAddress = MAX_PER_ADDRESS } = options;
  const byToken = new Map<string, Session>(), former = createFormerUsers(io);
  const usedLoginIds = new Map<string, number>(); // until when the cookie of that login is valid
  const usersAt = new Map<string, number>(); // how many a prefix, or a provider, has
  const places = createPlaces(io, losePlace);

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
    const holder = directory.find(login.name), gone = former.find(login.name); // never both
    const last = holder ?? gone, isSameKey = last !== undefined && sameKey(last.key, login.key);
    const isLater = isSameKey && login.counter > last.clock;
    const refusedUntil = (at: number) => ({ refusedFor: Math.max(0, Math.ceil((at - io.now) / 1000)) });

    if (holder && isSameKey && holder.nonce === nonce) return "again";
    if (holder && !isLater) {
      return refusedUntil(Math.max(...placesOf(holder).map(({ provedAt }) => provedAt)) + CONSENT_MS);
    }
    const freeAt = gone && !isLater ? gone.leftAt + (isSameKey ? COOKIE_LIFE_MS : gone.heldMs) : 0;
    if (freeAt > io.now) return refusedUntil(freeAt);
    if (usedLoginIds.has(login.id)) return { refusedFor: 0 }; // a repetition; others have had the name since
    return holder ? "replaces" : "new";
  }

  /** Lets in whoever has climbed the ladder, or says why not. */
  function admit(login: Login, at: Address, agreed: Uint8Array): Refusal | undefined {
    const nonce = publicNonce(login.id), claimed = claim(login, nonce), holder = directory.find(login.name);
    if (typeof claimed === "object") return { reason: "name-taken", seconds: claimed.refusedFor };
    if (holder && claimed === "again") {
      const hadNoWelcome = holder.window.highest < 0; // a client that has had it does not ask from elsewhere
      if (at.endpoint !== holder.home.endpoint && hadNoWelcome) move(holder, at, login.cookie);
      return void on.greet(holder, login, false, placeAt(holder, at.endpoint));
    }
    const stays = holder && prefixOf(holder.home.endpoint) === prefixOf(at.endpoint);
    if ((!holder && directory.size() >= maxUsers) || (!stays && !takesMore(at))) return { reason: "full", seconds: 0 };
    if (holder) remove(holder, "replaced");

    const { id, counter: clock, name, local, rttMs, terms, direct } = login, token = hex(io.random(8));
    const wishes = { keepName: terms.flag, isHidden: direct === 0 };
    const theirs = { clock, name, nonce, key: keep(login.key), local, rttMs, ...wishes };
    const ours = { token, keys: controlKeys(agreed, token), window: replayWindow(), sent: clock };
    const limit = io.limits.keyOf(token), keyText = hex(login.key);
    const known = { nat: UNKNOWN_NAT, limit, keyText, friends: new Set<string>() };
    const session: Session = { ...theirs, ...ours, ...known, home: NOWHERE, other: null };
    session.home = places.enter(session, at, login.cookie);
    byToken.set(token, session);
    directory.put(session);
    countUser(session.home, 1);
    former.forget(name);
    if (usedLoginIds.size >= MAX_USERS) usedLoginIds.delete(usedLoginIds.keys().next().value!);
    usedLoginIds.set(id, io.now + COOKIE_LIFE_MS);
    io.emit({ event: "login", name, public: at.endpoint });
    on.greet(session, login, true);
  }

  function remove(session: Session, reason: "left" | "vanished" | "replaced"): void {
    byToken.delete(session.token);
    directory.remove(session.name);
    countUser(session.home, -1);
    for (const place of placesOf(session)) places.leave(session, place);
    io.emit({ event: "logout", name: session.name, reason });
    if (reason !== "replaced") former.remember(session, reason === "vanished" && session.keepName ? NAME_HELD_MS : 0);
  }

  // -- where they are

  const placesOf = ({ home, other }: Session) => other ? [home, other] : [home];
  /** Where the client can be reached now. */
  const livePlaces = (session: Session) => placesOf(session).filter(places.isLive);
  const placeAt = ({ home, other }: Session, endpoint: Endpoint) => {
    const place = home.endpoint === endpoint ? home : other?.endpoint === endpoint ? other : undefined;
    return place && places.isLive(place) ? place : undefined;
  };

  /** The client receives there now. Nothing happens if the prefix has no room, or if the client moves all the time. */
  function move(session: Session, to: Address, cookie: string): Place | undefined {
    const { home, other } = session, isOther = isIPv6(to.endpoint) !== isIPv6(home.endpoint);
    const old = isOther ? other : home, stays = !isOther && prefixOf(to.endpoint) === prefixOf(home.endpoint);
    if (!isOther && !stays && !takesMore(to)) return;
    if (old?.endpoint !== to.endpoint && !stays && !io.limits.allows(session, "moves")) return;
    if (old) places.leave(session, old); // first, since it may be the same one
    const place = places.enter(session, to, cookie);
    if (isOther) session.other = place;
    else goHome(session, place);
    return place;
  }

  function goHome(session: Session, place: Place): void {
    countUser(session.home, -1);
    countUser(place, 1);
    const isNew = place.endpoint !== session.home.endpoint;
    session.home = place;
    if (isNew) io.emit({ event: "moved", name: session.name, public: place.endpoint });
  }

  /** Nobody has shown for long that he is there. */
  function losePlace(place: Place, session: Session): void {
    const { home, other } = session;
    if (place !== other && !(other && places.isLive(other))) return remove(session, "vanished");
    session.other = null;
    if (place === home) goHome(session, other!);
    places.leave(session, place);
  }

  function takesMore({ endpoint }: Address): boolean {
    const users = (part: string) => usersAt.get(part) ?? 0;
    const most = Math.max(10 * maxPerAddress, PROVIDER_SHARE * maxUsers);
    return users(prefixOf(endpoint)) < maxPerAddress && users(providerOf(endpoint)) < most;
  }

  function countUser({ parts }: Place, change: 1 | -1): void {
    for (const part of parts) {
      const users = (usersAt.get(part) ?? 0) + change;
      if (users > 0) usersAt.set(part, users);
      else usersAt.delete(part);
    }
  }

  // -- what is said to them and by them

  /** Whether the client itself has said this, and for the first time. */
  const isGenuine = ({ keys, window }: Session, data: Uint8Array, counter: number) =>
    verifies(data, keys.toServer) && accept(window, counter);

  /** Whatever else it says, only what a client has had to receive shows that it is there. */
  function keepAlive(session: Session, message: Control & { type: "KEEPALIVE" }, place: Place): void {
    const { rttMs, nat, local, cookie, counter: asked } = message;
    Object.assign(session, { rttMs, nat, local });
    places.isProof(place, cookie);
    toClient(session, { type: "ALIVE", asked, cookie: place.cookie, public: place.endpoint }, place);
  }

  function toClient(
    session: Session,
    message: ControlBody,
    to = places.isLive(session.home) ? session.home : session.other,
  ): void {
    if (!to) return;
    const data = encode(message, { id: session.token, counter: ++session.sent, key: session.keys.toClient });
    if (places.send(to, data)) on.ask(session, to);
  }

  function refuse(session: Session, reason: string, about = ""): void {
    if (io.limits.allows(session, "errors")) toClient(session, { type: "ERROR", reason, about, seconds: 0 });
  }

  function befriend(session: Session, { keyText }: Session): void { // its client knows that user
    session.friends.delete(keyText);
    if (session.friends.size >= MAX_FRIENDS) session.friends.delete(session.friends.keys().next().value!);
    session.friends.add(keyText);
  }

  /** Forgets what is over, at most so much of it. True: that was all. */
  function sweep(most: number): boolean {
    const isDone = former.sweep(most);
    let left = most;
    for (const [id, staleAt] of usedLoginIds) { // the oldest first
      if (staleAt > io.now || left-- <= 0) break;
      usedLoginIds.delete(id);
    }
    return places.sweep(most) && isDone && left > 0;
  }

  return {
    ...{ admit, remove, move, livePlaces, placeAt, isGenuine, keepAlive, toClient, refuse, befriend, sweep },
    ...{ toPlace: places.send, askPlace: places.ask },
    find: (token: string) => byToken.get(token),
    all: () => byToken.values(),
    wasHere: (name: string) => former.find(name) !== undefined,
    isUsersPrefix: places.isPrefix,
    isEmpty: () => byToken.size + usedLoginIds.size === 0 && former.isEmpty() && places.isEmpty(),
  };
}

// ---------------------------------------------------------------------------------------------------- former users
//
// Who was here is called "offline" rather than "unknown", and may have his name held for him. This room knows no
// sessions, only whose they were.

const REMEMBERED_MS = 3_600_000, MAX_REMEMBERED = 10_000;
/** Most names held for vanished clients of one prefix, and of one provider: the others are not to lose theirs. */
const HELD_PER_PREFIX = 500, HELD_PER_PROVIDER = 2_500;

type FormerUser = Pick<Session, "key" | "clock"> & { leftAt: number; heldMs: number; holders: readonly string[] };

function createFormerUsers(io: Io) {
  // By name, the one first that left first. A name goes from the first map to the second when it is not held any more.
  const held = new Map<string, FormerUser>(), free = new Map<string, FormerUser>();
  const heldBy = new Map<string, number>(); // by prefix, and by provider

  function forget(name: string): void {
    for (const holder of held.get(name)?.holders ?? []) count(holder, -1);
    if (!held.delete(name)) free.delete(name);
  }
  function count(holder: string, change: 1 | -1): void {
    heldBy.set(holder, (heldBy.get(holder) ?? 0) + change);
    if (heldBy.get(holder) === 0) heldBy.delete(holder);
  }
  const hasShare = ([prefix, provider]: readonly string[]) =>
    (heldBy.get(prefix!) ?? 0) < HELD_PER_PREFIX && (heldBy.get(provider!) ?? 0) < HELD_PER_PROVIDER;

  return {
    forget,
    find: (name: string) => held.get(name) ?? free.get(name),
    remember({ name, key, clock, home }: Session, wantedMs: number): void {
      const heldMs = hasShare(home.parts) ? wantedMs : 0, isHeld = heldMs > 0, holders = home.parts;
      // The oldest one goes; one whose name is held only if all are.
      if (held.size + free.size >= MAX_REMEMBERED) forget([...free.keys().take(1), ...held.keys().take(1)][0]!);
      (isHeld ? held : free).set(name, { key, clock, leftAt: io.now, heldMs, holders });
      if (isHeld) { for (const holder of holders) count(holder, 1); }
    },
    /** At most so many; true: those were all. */
    sweep(most: number): boolean {
      for (const [name, user] of held) {
        if (user.leftAt + user.heldMs > io.now) break;
        if (most-- <= 0) return false;
        forget(name);
        free.set(name, user);
      }
      for (const [name, { leftAt }] of free) {
        if (leftAt + REMEMBERED_MS > io.now) break;
        if (most-- <= 0) return false;
        free.delete(name);
      }
      return true;
    },
    isEmpty: () => held.size + free.size === 0,
  };
}

// ---------------------------------------------------------------------------------------------------- introductions
//
// A NAT lets a datagram in only where one has gone out before. So both must send at about the same time, each to where
// the other one is seen: this is what an introduction tells them. Until one of those datagrams has come through, all
// messages pass here, and the first one travels together with the call. This room cannot read what it passes on.

const MAX_PUNCH_DELAY_MS = 150; // most that the nearer of two peers waits, since each round trip is a client's word

/** What one IPv4 address, or an IPv6 /64, is taken for. */
const siteOf = ({ endpoint }: Place) => startOf(endpoint, 8);
const isPrivate = (endpoint: Endpoint) => scopeOf(hostOf(endpoint)) === "private";

function createRelay(io: Io, { find }: Directory, { toClient, refuse, wasHere, livePlaces, befriend }: Sessions) {
  /** Where `viewer` may try to reach `subject`: where we see it and, behind the same NAT, its private addresses. */
  function candidatesFor(subject: Session, viewer: Session): Endpoint[] {
    if (subject.isHidden || viewer.isHidden) return []; // they will not meet, so neither need know
    const places = livePlaces(subject), sites = livePlaces(viewer).map(siteOf);
    const isSameSite = places.some((place) => sites.includes(siteOf(place)));
    const isThisHost = places.some(({ endpoint }) => scopeOf(hostOf(endpoint)) === "loopback"); // nothing is nearer
    const nearer = isSameSite && !isThisHost ? subject.local.filter(isPrivate) : [];
    return [...new Set([...nearer, ...places.map(({ endpoint }) => endpoint)])];
  }

  // Both introductions leave in the same tick. The nearer peer has its own earlier, by half the difference of the round
  // trips, and waits for so long, so that the first punches cross on the way: why, says "paths" in client.ts.
  function introduction(subject: Session, viewer: Session): Introduced {
    const punchAfterMs = Math.min(MAX_PUNCH_DELAY_MS, Math.max(0, (subject.rttMs - viewer.rttMs) >> 1));
    const { name, nonce, key, nat } = subject;
    return { name, nonce, key, candidates: candidatesFor(subject, viewer), nat, punchAfterMs };
  }

  /** Whom a client does not know cannot use up what others have with it. */
  const mayReach = (target: Session, from: Session, what: "calls" | "punches" | number) =>
    target.friends.has(from.keyText) ||
    (livePlaces(target).every(({ bytes }) => bytes < STRANGERS_BYTES) && io.limits.mayReach(target, from, what));

  return {
    pass(session: Session, { to, nonce, call, body }: Control & { type: "P2PTRANS" }): void {
      const target = find(to), isCall = call % 2 === 1;
      if (!target) return refuse(session, wasHere(to) ? "offline" : "unknown", to);
      if (call > 1) befriend(session, target);
      if (body.length > MAX_RELAYED_BYTES) return refuse(session, "too-long", to);
      if (!io.limits.allows(session, "relayedBytes", body.length)) return refuse(session, "busy", to);
      const isCurrent = nonce === target.nonce; // else it is sealed for an earlier login: nobody could open it
      const passes = isCurrent && !isCall;
      if (!passes && !io.limits.allows(session, "calls")) return refuse(session, "busy", to);
      if (!mayReach(target, session, passes ? body.length : "calls")) return refuse(session, "busy", to);
      if (passes) return toClient(target, { type: "RELAYED", from: session.name, nonce: session.nonce, body });
      const readable = body.subarray(0, isCurrent ? body.length : 0);
      toClient(target, { type: "P2PSOMEONEWANTTOCALLYOU", peer: introduction(session, target), body: readable });
      toClient(session, { type: "INTRODUCTION", peer: introduction(target, session) });
    },
    punched(session: Session, { peer }: Control & { type: "PUNCHED" }): void {
      const target = find(peer);
      if (!target || !io.limits.allows(session, "punches") || !mayReach(target, session, "punches")) return;
      toClient(target, { type: "PUNCHED", peer: session.name });
    },
  };
}

// ---------------------------------------------------------------------------------------------------- list of users
//
// In order of name, in pages of one datagram each. Whoever wants more asks for what comes after the last name he has.
// Pages leave in turns, one of each who has asked: many who ask at once wait for each other, and nobody else does.

const PAGE_BYTES = 1_032; // the last user begins at 1,031 at most: 1,031 + 92 for the longest + 69 around them = 1,192
const PAGES_PER_ANSWER = 16; // more would overflow the asker's socket buffer (92 full datagrams on Linux)
const ANNOUNCE_UP_TO = 16; // while so few are logged in, all hear of a newcomer: nobody has to ask before he writes
/** So many pages leave at once, and after so long the next ones: 4,000 a second, twice what one prefix may have. */
const PAGES_PER_TURN = 8, TURN_MS = 2;

const scratch = new Uint8Array(MAX_NAME_BYTES);
const asUser = ({ name, nonce, key, home, isHidden }: Session): User => ({
  name,
  nonce,
  key,
  public: isHidden ? "" : home.endpoint,
});
/** Length and name, nonce, key, length and address, port, at most; see `user` in protocol.ts. */
const userBytes = ({ name, home }: Session) =>
  1 + utf8.encodeInto(name, scratch).written + 8 + 32 + 1 + (isIPv6(home.endpoint) ? 16 : 4) + 2;

/** A question for users, and how far it has been answered. */
type Question = { asked: number; prefix: string; after: string; page: number };

function createList(io: Io, directory: Directory, { find, toClient, refuse }: Sessions) {
  const questions = new Map<string, Question>(); // by token; the session whose turn it is comes first
  let turnAt = 0; // not before that

  function pageAfter(prefix: string, after: string): { users: User[]; more: boolean } {
    const users: User[] = [];
    let left = PAGE_BYTES;
    for (const session of directory.after(prefix, after)) {
      if (left <= 0) return { users, more: true };
      left -= userBytes(session);
      users.push(asUser(session));
    }
    return { users, more: false };
  }

  /** Sends the next page. False: the question has been answered. */
  function answer(session: Session, question: Question): boolean {
    const { asked, prefix, after, page } = question, total = directory.size();
    if (!io.limits.allows(session, "pages")) { // before the work is done
      refuse(session, "busy");
      return false;
    }
    const { users, more } = pageAfter(prefix, after), isLast = !more || page === PAGES_PER_ANSWER - 1;
    const last = isLast ? page : PAGES_PER_ANSWER - 1; // as far as we know
    toClient(session, { type: "USERS", asked, page, last, more: Number(more), total, users });
    question.page++;
    question.after = users.at(-1)?.name ?? after;
    return !isLast;
  }

  return {
    firstPage: () => pageAfter("", "").users,
    ask(session: Session, { counter: asked, prefix, after }: Control & { type: "GETALLUSER" }): void {
      questions.set(session.token, { asked, prefix, after, page: 0 }); // it replaces an older one, and keeps its turn
    },
    announce(newcomer: Session, all: Iterable<Session>): void {
      const total = directory.size(), users = [asUser(newcomer)];
      if (total > ANNOUNCE_UP_TO) return;
      const message = { type: "USERS", asked: 0, page: 0, last: 0, more: 0, total, users } as const;
      for (const session of all) if (session !== newcomer) toClient(session, message);
    },
    wake(): void {
      if (questions.size === 0 || io.now < turnAt) return;
      for (let left = PAGES_PER_TURN; left > 0 && questions.size > 0; left--) {
        const [token, question] = questions.entries().next().value!, session = find(token);
        questions.delete(token);
        if (session && answer(session, question)) questions.set(token, question);
      }
      turnAt = io.now + TURN_MS;
    },
    wakeAt: () => questions.size > 0 ? turnAt : Infinity,
  };
}

// ==================================================================================================== reference
//
// Skip this at first reading: limits, directory, STUN. Behind them `createServer` puts the rooms together.

// ---------------------------------------------------------------------------------------------------- limits
//
// What others can have us do, and how often. A limit is one number (see `conform`) for each session, prefix or callee, or
// one for all together. This room does not know what it limits. Everything is charged before the work is done, but for the
// MAC of a session's datagram: else whoever sees a token could use up what its client may do.

/** What one session may do; all sessions of one prefix together may do ten times as much: a carrier's NAT has many. */
const OF_SESSION = {
  datagrams: { perSecond: 2_000, burst: 5_000 }, // of all kinds; 2,000 of 131 bytes are the 256 KiB below
  calls: { perSecond: 20, burst: 100 },
  punches: { perSecond: 100, burst: 200 }, // of reports that one has punched: others' calls must not use up one's own
  moves: { perSecond: 1, burst: 10 },
  pages: { perSecond: 200, burst: 2_000 },
  relayedBytes: { perSecond: 256 * 1024, burst: 512 * 1024 },
  errors: { perSecond: 10, burst: 20 },
} satisfies Record<string, Rate>;
const PREFIX_FACTOR = 10;
/** A session that needs no more than this part of what it may have has it, whatever its neighbours do. */
const FLOOR = 0.01;
/**
 * Of a prefix. STUN cannot ask for a cookie, and only its answers are larger than the questions: 1.6 times, 2.2 with
 * IPv6, 2.8 and 4.6 with a second address. Whoever forges a victim's address has no more than this sent to it.
 */
const STRANGERS: Rate = { perSecond: 500, burst: 1_000 }, LOGINS: Rate = { perSecond: 200, burst: 2_000 };
const STUN: Rate = { perSecond: 50, burst: 400 };
/** Of all together; those who are logged in have STUN answers of their own. */
const ALL_STRANGERS: Rate = { perSecond: 20_000, burst: 5_000 }, ALL_LOGINS: Rate = { perSecond: 5_000, burst: 5_000 };
const ALL_STUN: Rate = { perSecond: 2_000, burst: 2_000 };
/** What one callee hears from all whom he does not know, and of that, from those of one prefix. */
const CALLS_TO: Rate = { perSecond: 50, burst: 200 }, CALLS_TO_FROM: Rate = { perSecond: 5, burst: 50 };
const PUNCHES_TO: Rate = { perSecond: 50, burst: 200 }, PUNCHES_TO_FROM: Rate = { perSecond: 10, burst: 100 };
const BYTES_TO: Rate = { perSecond: 1024 * 1024, burst: 2048 * 1024 };
const BYTES_TO_FROM: Rate = { perSecond: 256 * 1024, burst: 512 * 1024 };
const SMALL_BYTES = 100; // what a datagram costs its receiver besides its bytes

/** Where a limit is kept: two places in the tables, which a secret hash has chosen. */
type Key = readonly [number, number];
const SLOTS = 2 ** 15;

/**
 * A limit for each key by one rule, in a table of fixed size: it is never full, and nothing in it has to be forgotten. The
 * earlier of a key's two arrival times counts (a count-min sketch): another key does it harm only if it shares both.
 */
function createKeyedLimit(rule: Rate) {
  let arrivals: Float64Array | undefined;
  return ([one, other]: Key, now: number, cost = 1): boolean => {
    arrivals ??= new Float64Array(SLOTS);
    const next = conform(Math.min(arrivals[one]!, arrivals[other]!), rule, now, cost);
    if (next === null) return false;
    arrivals[one] = Math.max(arrivals[one]!, next);
    arrivals[other] = Math.max(arrivals[other]!, next);
    return true;
  };
}

const times = (factor: number) => ({ perSecond, burst }: Rate): Rate => (
  { perSecond: factor * perSecond, burst: Math.max(1, factor * burst) }
);

type Limits = ReturnType<typeof createLimits>;
function createLimits(secret: Uint8Array, isUsersPrefix: (endpoint: Endpoint) => boolean) {
  const ofSession = mapValues(OF_SESSION, createKeyedLimit);
  const ofPrefix = mapValues(OF_SESSION, (rule) => createKeyedLimit(times(PREFIX_FACTOR)(rule)));
  const floor = mapValues(OF_SESSION, (rule) => createKeyedLimit(times(FLOOR)(rule)));
  const strangers = createKeyedLimit(STRANGERS), logins = createKeyedLimit(LOGINS), stun = createKeyedLimit(STUN);
  const callsTo = createKeyedLimit(CALLS_TO), callsToFrom = createKeyedLimit(CALLS_TO_FROM);
  const punchesTo = createKeyedLimit(PUNCHES_TO), punchesToFrom = createKeyedLimit(PUNCHES_TO_FROM);
  const bytesTo = createKeyedLimit(BYTES_TO), bytesToFrom = createKeyedLimit(BYTES_TO_FROM);
  const allStrangers = createLimit(ALL_STRANGERS), allLogins = createLimit(ALL_LOGINS);
  const allStun = createLimit(ALL_STUN), usersStun = createLimit(ALL_STUN);
  let time = 0, last: number | undefined;

  function keyOf(text: string): Key {
    const mac = sipHash(secret, utf8.encode(text));
    return [(mac[0]! << 8 | mac[1]!) % SLOTS, (mac[2]! << 8 | mac[3]!) % SLOTS];
  }

  return {
    keyOf,
    /** The limits' own time begins at 0, so that sums are exact; it never goes back, so that no limit stays used up. */
    setTime(now: number): void {
      time += Math.max(0, now - (last ?? now));
      last = now;
    },
    allows: ({ limit, home }: { limit: Key; home: { prefix: Key } }, what: keyof typeof OF_SESSION, cost = 1) =>
      ofSession[what](limit, time, cost) &&
      (floor[what](limit, time, cost) || ofPrefix[what](home.prefix, time, cost)),
    mayBeStranger: (from: Endpoint) => strangers(keyOf(prefixOf(from)), time) && allStrangers(time),
    mayLogIn: (prefix: Key) => logins(prefix, time) && allLogins(time),
    /** Of so many more logins, as far as there are so many left. */
    punish(prefix: Key, count: number): void {
      while (count-- > 0 && logins(prefix, time));
    },
    mayAskStun: (from: Endpoint) =>
      stun(keyOf(prefixOf(from)), time) && (isUsersPrefix(from) ? usersStun : allStun)(time),
    /** Whether a callee is to hear from somebody whom he does not know: a call, a report of a punch, or so many bytes. */
    mayReach(callee: Session, caller: Session, what: "calls" | "punches" | number): boolean {
      const [a, b] = callee.limit, [c, d] = caller.home.prefix, pair: Key = [a ^ c, b ^ d];
      if (what === "calls") return callsToFrom(pair, time) && callsTo(callee.limit, time);
      if (what === "punches") return punchesToFrom(pair, time) && punchesTo(callee.limit, time);
      return bytesToFrom(pair, time, what + SMALL_BYTES) && bytesTo(callee.limit, time, what + SMALL_BYTES);
    },
  };
}

function mapValues<K extends string, T, R>(record: Record<K, T>, change: (value: T) => R): Record<K, R> {
  return Object.fromEntries(Object.entries<T>(record).map(([key, value]) => [key, change(value)])) as Record<K, R>;
}

// ---------------------------------------------------------------------------------------------------- the directory
//
// Who is there, by name and in order of name: all that several servers would have to share. It does not know what a
// session is, only that it has a name.

type Directory = ReturnType<typeof createDirectory<Session>>;

const CHUNK = 512; // names that are kept in one array: a change moves no more than these

function createDirectory<T extends { name: string }>() {
  const byName = new Map<string, T>();
  const chunks: string[][] = [[]]; // all names, sorted by code unit; none of them is empty, except the only one
  /** The first index at which it holds, in a row in which it holds from somewhere on. */
  function firstWhere(length: number, holds: (i: number) => boolean): number {
    let low = 0, high = length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (holds(middle)) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  /** The chunk that a name belongs into, and its place there. */
  function position(name: string): [number, number] {
    const at = Math.max(0, firstWhere(chunks.length, (i) => chunks[i]![0]! > name) - 1), chunk = chunks[at]!;
    return [at, firstWhere(chunk.length, (i) => chunk[i]! >= name)];
  }
  return {
    size: () => byName.size,
    find: (name: string) => byName.get(name),
    put(entry: T): void {
      if (!byName.has(entry.name)) {
        const [at, i] = position(entry.name), chunk = chunks[at]!;
        chunk.splice(i, 0, entry.name);
        if (chunk.length > CHUNK) chunks.splice(at + 1, 0, chunk.splice(CHUNK / 2));
      }
      byName.set(entry.name, entry);
    },
    remove(name: string): void {
      if (!byName.delete(name)) return;
      const [at, i] = position(name), chunk = chunks[at]!;
      chunk.splice(i, 1);
      if (chunk.length === 0 && chunks.length > 1) chunks.splice(at, 1);
    },
    /** Those whose name begins with the prefix and comes after the other, in order. */
    *after(prefix: string, after: string): Generator<T> {
      let [at, i] = position(after > prefix ? after : prefix);
      if (chunks[at]![i] === after) i++;
      for (; at < chunks.length; at++, i = 0) {
        for (const name of chunks[at]!.slice(i)) {
          if (!name.startsWith(prefix)) return;
          yield byName.get(name)!;
        }
      }
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
/** Most that is forgotten at once, and when it goes on: nobody waits while a hundred thousand leave together. */
const SWEEP_SLICE = 100, SWEEP_PAUSE_MS = 3;

/** Makes a server: all the rooms, and what goes from one to another. */
export function createServer(options: ServerOptions): Server {
  let effects: Effect<ServerEvent>[] = [], sweepAt = Infinity;
  const directory = createDirectory<Session>();
  const io: Io & { now: number } = {
    now: 0,
    random: options.random,
    limits: createLimits(options.random(16), (endpoint) => sessions.isUsersPrefix(endpoint)),
    emit: (event: ServerEvent) => void effects.push({ kind: "event", event }),
    send: ({ socket, endpoint: to }: Address, data: Uint8Array) =>
      void effects.push({ kind: "send", socket, to, data }),
  };
  const ladder = createLadder(io, options, (...proved) => sessions.admit(...proved));
  const sessions = createSessions(io, options, directory, { greet, ask }), { toClient } = sessions;
  const relay = createRelay(io, directory, sessions), list = createList(io, directory, sessions);
  const stun = createStun(io, options);

  /** WELCOME bears the id and the counter of the LOGIN, since it is only now that the client learns its token. */
  function greet(session: Session, { id, counter }: Login, isNew: boolean, place = session.home): void {
    const { token, keys } = session, users = list.firstPage(), total = directory.size();
    const ports = { secondPort: stun.portOf(SECOND_PORT), thirdPort: stun.portOf(THIRD_PORT) };
    const { cookie, endpoint } = place, kept = Number(options.keepsKeys ?? false);
    const welcome = { type: "WELCOME", token, cookie, kept, public: endpoint, ...ports, total, users } as const;
    if (sessions.toPlace(place, encode(welcome, { id, counter, key: keys.toClient }))) ask(session, place);
    if (isNew) list.announce(session, sessions.all());
  }

  /** Asks a client to show that it still receives there. */
  function ask({ token: id }: Session, place: Place): void {
    const { cookie } = place, terms = { version: VERSION, flag: true }, { public: key } = options.keys;
    sessions.askPlace(place, encode({ type: "COOKIE", cookie, key, terms }, { id, counter: 0 }));
  }

  /** In order of cost: what can be thrown away is thrown away before it costs more. */
  function receive(datagram: Datagram): void {
    const { data, socket, from } = datagram, at = { socket, endpoint: from };
    if (data[0]! < 4) return io.limits.mayAskStun(from) ? stun.answer(datagram) : undefined;
    if (data.length < MIN_CLIENT_BYTES) return; // not even a cookie in answer: that could be larger
    const header = controlHeader(data);
    if (!header) return;
    if (data[1] === CONTROL.LOGIN.code) return ladder.climb(at, data);
    const session = sessions.find(header.id);
    if (!session) return ladder.meet(at, data);
    if (isSeen(session.window, header.counter)) return;
    const message = decode(data); // this, and the MAC, cost more than all that came before
    if (!message || !isFromClient(message.type) || !sessions.isGenuine(session, data, message.counter)) return;
    if (!io.limits.allows(session, "datagrams")) return;
    const place = sessions.placeAt(session, from) ?? moved(session, message, at);
    if (!place) return ladder.challenge(at, message, true); // whatever it says: perhaps it is somebody's copy of it
    place.bytes -= data.length;
    serve(session, message, place);
  }

  /** A client has moved if it brings the cookie that we have sent there. */
  const moved = (session: Session, message: Control, at: Address) =>
    message.type === "KEEPALIVE" && ladder.isCookieOf(at.endpoint, message.cookie)
      ? sessions.move(session, at, message.cookie)
      : undefined;

  function serve(session: Session, message: Control, place: Place): void {
    if (message.type === "LOGOUT") sessions.remove(session, "left");
    else if (message.type === "GETALLUSER") list.ask(session, message);
    else if (message.type === "P2PTRANS") relay.pass(session, message);
    else if (message.type === "PUNCHED") relay.punched(session, message);
    else if (message.type === "KEEPALIVE") sessions.keepAlive(session, message, place);
  }

  /** What the rooms have sent and told meanwhile. As long as they remember anything, there will be a sweep. */
  function effectsOf(act: () => void, now = io.now): Effect<ServerEvent>[] {
    effects = [];
    io.now = now;
    io.limits.setTime(now);
    act();
    list.wake();
    if (sweepAt === Infinity && !sessions.isEmpty()) sweepAt = now + SWEEP_INTERVAL_MS;
    return effects;
  }

  function wake(): void {
    if (io.now < sweepAt) return;
    sweepAt = Infinity;
    if (!sessions.sweep(SWEEP_SLICE)) sweepAt = io.now + SWEEP_PAUSE_MS;
  }

  return {
    opened: (socket, port, now) => effectsOf(() => stun.opened(socket, port), now),
    receive: (datagram, now) => effectsOf(() => receive(datagram), now),
    wake: (now) => effectsOf(wake, now),
    wakeAt: () => Math.min(sweepAt, list.wakeAt()),
    stop: () => effectsOf(() => sessions.all().forEach((session) => toClient(session, { type: "LOGOUT" }))),
  };
}

// ---------------------------------------------------------------------------------------------------- command line

const USAGE = `The rendezvous server of Punch.

  deno task server [options]
  bun server.ts [options]

  --port N             UDP port (default ${DEFAULT_PORT})
  --host A             address to listen on (default ::, which is IPv4 too)
  --alt-port N         second UDP port (default the next one)
  --alt-host A         second address of this host, for a complete STUN service; wants --host
  --identity F         keep the server's key in F, so that clients can know the server by its fingerprint
  --password-file F    nobody logs in without knowing what is in F (or in PUNCH_PASSWORD); - asks for it
  --max-users N        most users at a time (default ${MAX_USERS})
  --max-per-address N  most users at a time from one /24 or IPv6 /48 (default ${MAX_PER_ADDRESS})
  --json               one JSON object a line on stdout
  --trace[=FILE]       every datagram on stderr, or in FILE
  --quiet              only errors
  -h, --help; --version
`;
const NUMBERS = ["port", "alt-port", "max-users", "max-per-address"] as const;
const LOG_LINES: Rate = { perSecond: 20, burst: 200 };
const GOODBYE_MS = 50; // long enough for the last datagrams to leave

async function main(): Promise<void> {
  const { options, others } = readArguments({
    flags: ["json", "quiet", "help", "version"],
    values: [...NUMBERS, "host", "alt-host", "identity", "password-file"],
    optional: ["trace"],
  });
  const { json = false, quiet = false } = options;
  if (options.help) return void process.stdout.write(USAGE);
  if (options.version) return console.log(`Punch, version ${VERSION} of its protocol`);
  if (others.length > 0) throw new UsageError(`Unknown argument "${others[0]}"`);
  const number = (name: (typeof NUMBERS)[number], most: number, otherwise: number) => {
    const value = options[name] === undefined ? otherwise : Number(options[name] || NaN);
    if (Number.isInteger(value) && value >= 0 && value <= most) return value;
    throw new UsageError(`--${name} wants a number of 0 to ${most}, not "${options[name]}"`);
  };
  const port = number("port", 65535, DEFAULT_PORT), altPort = number("alt-port", 65535, port === 0 ? 0 : port + 1);
  const maxUsers = number("max-users", 1e7, MAX_USERS);
  const maxPerAddress = number("max-per-address", 1e7, MAX_PER_ADDRESS);
  const host = options.host ?? "::", altHost = options["alt-host"];
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
  const passwordFile = options["password-file"], keepsKeys = options.identity !== undefined;
  if (passwordFile === undefined) tellInvisible(["PUNCH_PASSWORD"]);
  const password = await secretWords({ file: passwordFile, variable: "PUNCH_PASSWORD", label: "password" });
  const keys = options.identity === undefined ? generateKeys() : identityIn(options.identity);

  const leftOut = (lines: number) => json ? jsonLine({ event: "left-out", lines }) : `${lines} lines were left out`;
  const log = createLog(json ? 1 : 2, leftOut, LOG_LINES);
  const say = (event: ServerEvent) => {
    if (json) log(jsonLine(event));
    else if (!quiet) log(inWords(event));
  };
  const hosts: ServerOptions["hosts"] = altHost === undefined ? undefined : [host, altHost];
  const server = createServer({
    ...{ keys, keepsKeys, maxUsers, maxPerAddress, hosts },
    random: (length) => Uint8Array.from(randomBytes(length)),
    password: password === undefined ? undefined : keyFromWords(password, "password", keys.public),
  });
  const onDatagram = openTrace(options.trace, createLog(2, leftOut));
  let address = host;
  const run = (host: string) => {
    address = host;
    const sockets = [{ host, port }, { host, port: altPort }, { host, port: 0 }];
    if (altHost !== undefined) sockets.push({ host: altHost, port }, { host: altHost, port: altPort });
    return listen(server, { sockets, onEvent: say, onDatagram });
  };
  const { ports, perform } = await listenOrFail(run, { host: options.host, json });
  const known = { fingerprint: fingerprintOf(keys.public), kept: keepsKeys, password: password !== undefined };
  say({ event: "listening", address, port: ports[0]!, altPort: ports[1]!, ...known, secret: false });
  const stop = () => {
    perform(server.stop());
    setTimeout(() => process.exit(0), GOODBYE_MS);
  };
  for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, stop);
}

function inWords(event: ServerEvent): string {
  if (event.event === "refused") return `${event.public} is not let in as ${event.name} (${event.reason})`;
  if (event.event === "logout") return `${event.name} is gone (${event.reason})`;
  if (event.event !== "listening") {
    return `${event.name} is ${event.event === "login" ? "here," : "now"} at ${event.public}`;
  }
  const { fingerprint, kept, password } = event, port = event.port === DEFAULT_PORT ? "" : `:${event.port}`;
  const lines = [`Listening on UDP port ${event.port} of ${event.address}. The others type:`];
  lines.push(`  deno task client <address of this host>${port}${kept ? `#${fingerprint}` : ""} <name>`);
  if (!kept) lines.push(`Its key, ${fingerprint}, is another one after each start: --identity FILE keeps it`);
  if (!password) lines.push("Anybody may log in: there is no --password-file, and no PUNCH_PASSWORD");
  return lines.join("\n");
}

if (import.meta.main) await main().catch(exitWith);
