/**
 * What server and client share: the messages, how they become bytes, how those are sealed, and the only place with a
 * socket.
 *
 * Between a client and the server ("control"); everything after the COOKIE is sealed by a MAC:
 *
 *     0      1      2        10        16                            n-8      n
 *     +------+------+--------+---------+-----------------------------+--------+
 *     | 0x50 | code | id     | counter | fields, see CONTROL         | MAC    |
 *     +------+------+--------+---------+-----------------------------+--------+
 *
 * Between two clients ("peer"); encrypted. It travels directly, or inside a control message as bytes that the server
 * cannot read:
 *
 *     0      1      2        6         12                            n-16     n
 *     +------+------+--------+---------+-----------------------------+--------+
 *     | 0x50 | code | index  | counter | encrypted fields, see PEER  | tag    |
 *     +------+------+--------+---------+-----------------------------+--------+
 *
 * Within a session counters only grow, so that a datagram that comes twice is noticed. Nothing in this file knows what
 * a login or a punch is for. Bytes that make no sense decode to null.
 *
 * @module
 */
/// <reference types="npm:bun-types@1.4.5" />
import { createCipheriv, createDecipheriv, createHash, hkdfSync, randomBytes, scryptSync } from "node:crypto";
import { createPrivateKey, createPublicKey, diffieHellman as x25519, type KeyObject } from "node:crypto";
import { createSocket } from "node:dgram";
import { closeSync, existsSync, fchmodSync, fstatSync, fsyncSync, linkSync, openSync, readFileSync } from "node:fs";
import { renameSync, unlinkSync, write as writeTo, writeFileSync } from "node:fs";
import { isIP } from "node:net";
import { dirname } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { Writable } from "node:stream";
import { parseArgs, type ParseArgsConfig } from "node:util";
import { crc32 } from "node:zlib";

// ---------------------------------------------------------------------------------------------------- machines
//
//     a datagram has come in,                               send a datagram,
//     a socket is open,          ---->  Machine  ---->      open or close a socket,
//     time has passed                                       tell an event to whoever runs it
//
// Server and client are machines. A machine has no socket, no timer and no clock: each call tells it what has happened
// and what time it is, and returns what is to be done. The same code therefore runs on real sockets (`listen`, below)
// and in a simulated internet (lab/network.ts), where a day takes seconds and every run can be repeated exactly.

/** A program without input and output: it is told what has happened and when (in ms), and returns what is to be done. */
export interface Machine<Event = unknown> {
  /** A socket has been bound to this port, or to none if `port` is 0. */
  opened(socket: number, port: number, now: number): Effect<Event>[];
  /** A datagram has come in. */
  receive(datagram: Datagram, now: number): Effect<Event>[];
  /** Time has passed. */
  wake(now: number): Effect<Event>[];
  /** When to call `wake` next; Infinity for never. Each of the other calls may change it. */
  wakeAt(): number;
}

/** What a machine wants done, in this order. `open` binds one more socket to a free port; a call of `opened` says which. */
export type Effect<Event = unknown> =
  | { kind: "send"; socket: number; to: Endpoint; data: Uint8Array; ttl?: number }
  | { kind: "open"; socket: number }
  | { kind: "close"; socket: number }
  | { kind: "event"; event: Event };

/** A datagram that has come in. Its bytes are good during the call only: the buffer is used again for the next one. */
export interface Datagram {
  /** The number of the machine's socket that received it. */ socket: number;
  /** Where it came from. A NAT may have changed that on the way. */ from: Endpoint;
  /** What the sender wrote. */ data: Uint8Array;
}

// ---------------------------------------------------------------------------------------------------- messages
// A message is one row of a table: its code, who says it to whom (client C, server S), and its fields in the order of
// their bytes. The types `Control`, `Peer` and `Handshake`, encoding and decoding all follow from these rows. Codes 1
// to 4 and 100 to 103, and names such as P2PSOMEONEWANTTOCALLYOU, come from the C++ demo of 2004 that this descends
// from.

/**
 * The version of this protocol. LOGIN and COOKIE keep their first fields, up to `terms`, in all versions, so that a
 * program of another version can be told what to do. Those of before there were versions have 0.
 */
export const VERSION = 3;
/** Most candidates that one client may announce. */
export const MAX_CANDIDATES = 8;
/** Most ports that a plan names. */
export const MAX_PLANNED_PORTS = 64;
const MAX_USERS_ON_PAGE = 32;

// The kinds of fields; "codecs" below says how they are written and read. Numbers are unsigned, the most significant
// byte first. An id is 8 bytes, and 16 hex digits in the program. Texts (in UTF-8) and lists begin with their length
// (u8), `bytes` with theirs (u16); `rest` ends where the seal begins. An endpoint is 4 or 16 (u8), an address of so
// many bytes, and a port (u16); none, where there may be none, is 0 (u8). A NAT class is one byte, and so are terms: a version and a flag.
const u8 = uint(1), u16 = uint(2), u32 = uint(4), u48 = uint(6);
const id: Codec<string> = { put: putDigits, get: (cursor) => hex(readBytes(cursor, 8)) };
const key: Codec<Uint8Array> = { put: writeBytes, get: (cursor) => readBytes(cursor, 32).slice() }; // receivers keep it
const bytes: Codec<Uint8Array> = { put: putBytes, get: (cursor) => readBytes(cursor, u16.get(cursor)) };
const rest: Codec<Uint8Array> = { put: writeBytes, get: (cursor) => readBytes(cursor, cursor.end - cursor.at) };
const text: Codec<string> = { put: putText, get: getText };
const peerName: Codec<string> = { put: putText, get: getPeerName };
const endpoint: Codec<Endpoint> = { put: putEndpoint, get: getEndpoint };
const endpointOrNone: Codec<Endpoint> = { put: putEndpointOrNone, get: getEndpointOrNone };
const natClass: Codec<NatClass> = { put: putNatClass, get: getNatClass };
const terms: Codec<Terms> = { put: putTerms, get: getTerms };
const ports = list(u16, MAX_PLANNED_PORTS), candidates = list(endpoint, MAX_CANDIDATES);
const user: Codec<User> = record({ name: peerName, nonce: id, key, public: endpointOrNone });
const users = list(user, MAX_USERS_ON_PAGE), bothCandidates = list(endpoint, 2 * MAX_CANDIDATES);
const introduced: Codec<Introduced> = record(
  { name: peerName, nonce: id, key, candidates: bothCandidates, nat: natClass, punchAfterMs: u16 },
);

/**
 * Between a client and the server. The header's `id` is, until WELCOME, the login's, which the client has chosen; from
 * then on it is the session's token, which the server has chosen. Only these two know either. A cookie shows
 * that one receives where one says: whoever gets it says it in his next LOGIN or KEEPALIVE. `direct` is 0 if nobody is
 * to be told where one is, `kept` if the server has another key each time. Bits of `call` in P2PTRANS: 1, introduce us;
 * 2, I know that user, so nobody whom I do not know is to use up what he may send me.
 */
export const CONTROL = {
  LOGIN: row(1, "C -> S", { cookie: id, key, proof: id, terms, direct: u8, rttMs: u16, name: text, local: candidates }),
  LOGOUT: row(2, "C <-> S", {}),
  P2PTRANS: row(3, "C -> S", { to: text, nonce: id, call: u8, body: bytes }),
  GETALLUSER: row(4, "C -> S", { prefix: text, after: text }),
  COOKIE: row(5, "S -> C", { cookie: id, key, terms }),
  WELCOME: row(6, "S -> C", {
    token: id,
    cookie: id,
    kept: u8,
    public: endpoint,
    secondPort: u16,
    thirdPort: u16,
    total: u32,
    users,
  }),
  KEEPALIVE: row(7, "C -> S", { cookie: id, rttMs: u16, nat: natClass, local: candidates }),
  ALIVE: row(8, "S -> C", { asked: u48, cookie: id, public: endpoint }),
  USERS: row(9, "S -> C", { asked: u48, page: u16, last: u8, more: u8, total: u32, users }),
  INTRODUCTION: row(10, "S -> C", { peer: introduced }),
  RELAYED: row(11, "S -> C", { from: text, nonce: id, body: bytes }),
  PUNCHED: row(12, "C <-> S", { peer: text }),
  ERROR: row(13, "S -> C", { reason: text, about: text, seconds: u16 }),
  P2PSOMEONEWANTTOCALLYOU: row(102, "S -> C", { peer: introduced, body: bytes }),
};

/**
 * Between two clients, encrypted. `states` has two bits for each part: it is missing, or came by relay, direct or lan.
 * With `spray` the `ports` of P2PPLAN are no list, but none or two: the first and the last one of a range.
 */
export const PEER = {
  P2PMESSAGE: row(100, "C <-> C", { seq: u32, base: u32, left: u16, part: rest }),
  P2PMESSAGEACK: row(101, "C <-> C", { next: u32, from: u32, states: rest }),
  P2PTRASH: row(103, "C <-> C", { probe: u32 }),
  P2PECHO: row(104, "C <-> C", { probe: u32 }),
  P2PPLAN: row(107, "C <-> C", { attempt: u8, spray: u8, ports }),
};

/** Between two clients, to agree on the keys; what is secret in them is encrypted already (see "Noise"). */
export const HANDSHAKE = {
  P2PFIRST: row(105, "C <-> C", { from: u32, probe: u32, noise: rest }),
  P2PSECOND: row(106, "C <-> C", { to: u32, from: u32, noise: bytes, sealed: rest }),
};

/** What each message says, for people: the trace and the README show it. */
const WORDS: Record<(Control | Peer | Handshake)["type"], string> = {
  LOGIN: "I want this name; the counter is my clock",
  LOGOUT: "I am leaving",
  P2PTRANS: "pass it on; `call` 1: call him, 2: a friend",
  GETALLUSER: "list users with this prefix after this name",
  COOKIE: "show that you receive here: say this cookie",
  WELCOME: "you are in, seen here; I have these ports",
  KEEPALIVE: "I am still here: this is your latest cookie",
  ALIVE: "I see you there; next time say this cookie",
  USERS: "one page of the list of users",
  INTRODUCTION: "whom you called can be reached here: punch",
  RELAYED: "that user sends you this",
  PUNCHED: "I have punched at that user, or he at you",
  ERROR: "I cannot do that, for this reason",
  P2PMESSAGE: "part; `left` follow; skip all before `base`",
  P2PMESSAGEACK: "arrived: all before `next`; from there: how",
  P2PSOMEONEWANTTOCALLYOU: "that user calls you, and sends this: punch",
  P2PTRASH: "a punch: has this reached you?",
  P2PECHO: "your punch has reached me",
  P2PFIRST: "handshake 1 of 2, a message; copies: punches",
  P2PSECOND: "handshake 2 of 2, a sealed message behind it",
  P2PPLAN: "my NAT will use these; `spray`: try many",
};

/** A row of the tables above. */
export interface Row<S extends Shape = Shape> {
  /** The second byte of the datagram. */ code: number;
  /** Who says it to whom. */ way: "C -> S" | "S -> C" | "C <-> S" | "C <-> C";
  /** The kind of each field. */ fields: S;
  /** All fields as one. */ codec: Codec<Values<S>>;
}
/** Fields by name. */
export type Shape = Record<string, Codec<unknown>>;
/** The values of fields, by name. */
export type Values<S extends Shape> = { [K in keyof S]: S[K] extends Codec<infer T> ? T : never };
/** The union of all messages of a table: the name, the header and the fields of each. */
export type Named<T extends Record<string, { fields: Shape }>, Header> = {
  [N in keyof T]: { type: N } & Header & Values<T[N]["fields"]>;
}[keyof T];

/** A message between client and server, decoded. */
export type Control = Named<typeof CONTROL, { id: string; counter: number }>;
/** A message between client and server before it is encoded: id, counter and MAC come from the session. */
export type ControlBody = Named<typeof CONTROL, unknown>;
/** A message between two clients, without its seal. */
export type Peer = Named<typeof PEER, unknown>;
/** One of the two messages that agree on keys. */
export type Handshake = Named<typeof HANDSHAKE, unknown>;

/** A line of the list of users: enough to send that user a sealed message without asking the server first. */
export interface User {
  /** As `userName` leaves it. */ name: string;
  /** Names the login. Its client has chosen it, so nobody can have a message opened that was meant for another login. */
  nonce: string;
  /** X25519 public key. */ key: Uint8Array;
  /** Where the server sees the user; empty if nobody is to know. */ public: Endpoint;
}

/** A peer as the server introduces it. */
export interface Introduced {
  /** As `userName` leaves it. */ name: string;
  /** Names the peer's login. */ nonce: string;
  /** X25519 public key. */ key: Uint8Array;
  /** Where the peer may be reached: at most twice MAX_CANDIDATES, its own and those of the server. */
  candidates: Endpoint[];
  /** The NAT that the peer has found itself behind. */ nat: NatClass;
  /** How long you who are told this are to wait with your first punch, so that both cross. */ punchAfterMs: number;
}

/** What LOGIN and COOKIE say in one byte. */
export interface Terms {
  /** The version of the protocol that the sender speaks. */ version: number;
  /** LOGIN: my key is to hold the name for me. COOKIE: I know your session, but not from where you speak. */
  flag: boolean;
}

/** How a NAT behaves towards UDP (RFC 4787, sections 4 and 5), as far as its client could find out. */
export interface NatClass {
  /** Which destinations share an outside port. */ mapping: (typeof MAPPINGS)[number];
  /** Who may send to an outside port. */ filtering: (typeof FILTERINGS)[number];
  /** How an outside port is chosen. */ allocation: (typeof ALLOCATIONS)[number];
}
/** Whom an outside port serves: everybody (EIM), all ports of one address (ADM), or one port of one address (APDM). */
export const MAPPINGS = ["unknown", "EIM", "ADM", "APDM"] as const;
/** Who comes in: everybody (EIF), who has an address that we have written to (ADF), or that and the port too (APDF). */
export const FILTERINGS = ["unknown", "EIF", "ADF", "APDF"] as const;
/** The outside port is the one inside; the next one; any of a block that belongs to the subscriber; any. */
export const ALLOCATIONS = ["unknown", "preserving", "sequential", "block", "random"] as const;

function row<S extends Shape>(code: number, way: Row["way"], fields: S): Row<S> {
  return { code, way, fields, codec: record(fields) };
}

const ROWS: Record<string, Row> = { ...CONTROL, ...PEER, ...HANDSHAKE };

/** The table of all messages with their words, for people. */
export function messageTable(): { name: string; code: number; way: string; what: string; fields: string[] }[] {
  const words: Record<string, string> = WORDS;
  return Object.entries(ROWS)
    .map(([name, { code, way, fields }]) => ({ name, code, way, what: words[name]!, fields: Object.keys(fields) }))
    .sort((a, b) => a.code - b.code);
}

// ---------------------------------------------------------------------------------------------------- bytes
// A new buffer costs a microsecond or more on Deno, however small it is, and a view costs next to nothing. So fields
// are written and read where they stand, and what is read is a view unless somebody keeps it.

const utf8 = new TextEncoder(), strictUtf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const NO_BYTES = new Uint8Array(0);

/** The lower-case hex digits of some bytes. */
export const hex = (data: Uint8Array): string => data.toHex();

/** One new array of several. */
export function concat(...parts: Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

const SLAB_BYTES = 4_096;
let slab = new Uint8Array(0);

/**
 * A copy of some bytes, of a multiple of 4, for what is kept as long as a session. It is cut out of a larger array: to
 * free one buffer for each of 100,000 sessions that vanish together costs Deno a pause of 0.2 s.
 */
export function keep(data: Uint8Array): Uint8Array {
  if (slab.length < data.length) slab = new Uint8Array(SLAB_BYTES);
  const kept = slab.subarray(0, data.length);
  kept.set(data);
  slab = slab.subarray(data.length);
  return kept;
}

/** A place in a datagram that is being written or read. */
export interface Cursor {
  /** The datagram. */ bytes: Uint8Array;
  /** The next byte. */ at: number;
  /** Where the fields end and the seal begins. */ end: number;
  /** Something that was read so far did not exist or was not valid. */ bad: boolean;
}

/** Makes room for so many bytes, and returns where they go. */
function reserve(cursor: Cursor, length: number): number {
  if (cursor.at + length > cursor.end) throw new RangeError(`Datagram exceeds "${cursor.end}" bytes`);
  cursor.at += length;
  return cursor.at - length;
}

function writeBytes(cursor: Cursor, data: Uint8Array): void {
  cursor.bytes.set(data, reserve(cursor, data.length));
}

/** The next bytes, as a view. */
function readBytes(cursor: Cursor, length: number): Uint8Array {
  cursor.bad ||= length > cursor.end - cursor.at;
  if (cursor.bad) return NO_BYTES;
  cursor.at += length;
  return cursor.bytes.subarray(cursor.at - length, cursor.at);
}

// ---------------------------------------------------------------------------------------------------- endpoints
// An address and a port are a text inside the program, so that they can be compared and be keys of a map. Each has one
// form only: IPv6 as RFC 5952 writes it, and IPv4 never as an IPv4-mapped IPv6 address.

/** An IP address and a UDP port: `203.0.113.7:41000`, `[2001:db8::1]:41000`. */
export type Endpoint = string;

/** Joins an IP literal and a port. */
export function formatEndpoint(host: string, port: number): Endpoint {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** Splits an endpoint; null unless it is an IP literal and a port of 1 to 65535. */
export function parseEndpoint(text: Endpoint): { host: string; port: number } | null {
  const [, v6, v4, digits] = /^(?:\[([^%]+)\]|(.+)):([1-9]\d{0,4})$/.exec(text) ?? [];
  const host = v6 ?? v4 ?? "", port = Number(digits);
  return isIP(host) === (v6 ? 6 : 4) && port <= 65535 ? { host, port } : null;
}

/** The IP literal of an endpoint, without brackets. */
export function hostOf(endpoint: Endpoint): string {
  const at = endpoint.lastIndexOf(":");
  return endpoint[0] === "[" ? endpoint.slice(1, at - 1) : endpoint.slice(0, at);
}

/** Whether this is an IPv6 endpoint. */
export const isIPv6 = (endpoint: Endpoint): boolean => endpoint[0] === "[";

/** The 4 or 16 bytes of an IP literal, or null. An IPv4-mapped address counts as the IPv4 address that it is. */
export function addressBytes(host: string): Uint8Array | null {
  const octets = octetsOf(host);
  return octets && new Uint8Array(octets);
}

/** The same as numbers, which cost less. */
function octetsOf(host: string): number[] | null {
  const version = isIP(host);
  if (version === 4) return host.split(".").map(Number);
  if (version === 0 || host.includes("%")) return null; // a zone has a meaning on one host alone
  const octetsOfGroup = (group: string) =>
    group.includes(".") ? group.split(".").map(Number) : [parseInt(group, 16) >> 8, parseInt(group, 16) & 255];
  const halves = host.split("::").map((half) => half === "" ? [] : half.split(":").flatMap(octetsOfGroup));
  const [head, tail = []] = halves as [number[], number[]?];
  const octets = [...head, ...Array<number>(16 - head.length - tail.length).fill(0), ...tail];
  return isIPv4Mapped(octets) ? octets.slice(12) : octets;
}

/** Whether these 16 bytes are `::ffff:` and an IPv4 address (RFC 4291, section 2.5.5.2). */
function isIPv4Mapped(octets: ArrayLike<number>): boolean {
  for (let i = 0; i < 12; i++) if (octets[i] !== (i < 10 ? 0 : 255)) return false;
  return true;
}

/** The text of 4 or 16 address bytes, IPv6 as RFC 5952 has it, which is how the URL standard writes it too. */
export function formatAddress(address: Uint8Array): string {
  if (address.length === 4) return address.join(".");
  return new URL(`http://[${hex(address).match(/..../g)!.join(":")}]`).hostname.slice(1, -1);
}

/** Where an address can be reached from: this host, this site (RFC 1918, RFC 6598, RFC 4193), this link, or anywhere. */
export function scopeOf(host: string): "loopback" | "private" | "link" | "public" | "none" {
  const octets = octetsOf(host);
  if (!octets) return "none";
  const [a, b] = octets as [number, number];
  if (octets.length === 16) {
    if (octets.every((octet, i) => octet === (i === 15 ? 1 : 0))) return "loopback";
    if ((a & 0xfe) === 0xfc) return "private";
    if (a === 0xfe && (b & 0xc0) === 0x80) return "link";
    return (a & 0xe0) === 0x20 ? "public" : "none";
  }
  if (a === 127) return "loopback";
  const isPrivate = a === 10 || (a === 172 && b >> 4 === 1) || (a === 192 && b === 168) || (a === 100 && b >> 6 === 1);
  if (isPrivate) return "private";
  if (a === 169 && b === 254) return "link";
  return a === 0 || a >= 224 ? "none" : "public";
}

// ---------------------------------------------------------------------------------------------------- codecs
// How the kinds of fields are written and read. Writing throws if there is no room, which is a bug of ours. Reading
// what a stranger has written never throws: it marks the cursor as bad and goes on with any value.

/** One kind of field. */
export interface Codec<T> {
  /** Writes a value. */ put(cursor: Cursor, value: T): void;
  /** Reads one; it means nothing if the cursor is bad. */ get(cursor: Cursor): T;
}

function uint(width: number): Codec<number> {
  return {
    put(cursor, value) {
      const first = reserve(cursor, width);
      for (let i = width - 1, left = value; i >= 0; i--, left = Math.floor(left / 256)) {
        cursor.bytes[first + i] = left % 256;
      }
    },
    get(cursor) {
      cursor.bad ||= width > cursor.end - cursor.at;
      if (cursor.bad) return 0;
      let value = 0;
      for (let i = 0; i < width; i++) value = value * 256 + cursor.bytes[cursor.at++]!;
      return value;
    },
  };
}

/** Writes bytes that are given as hex digits. */
function putDigits(cursor: Cursor, digits: string): void {
  for (let i = 0; i < digits.length; i += 2) u8.put(cursor, digitAt(digits, i) << 4 | digitAt(digits, i + 1));
}

function digitAt(digits: string, i: number): number {
  const letter = digits.charCodeAt(i);
  return letter < 58 ? letter - 48 : letter - 87; // 0 to 9, a to f
}

function putBytes(cursor: Cursor, data: Uint8Array): void {
  u16.put(cursor, data.length);
  writeBytes(cursor, data);
}

function putText(cursor: Cursor, value: string): void {
  const lengthAt = reserve(cursor, 1), room = Math.min(255, cursor.end - cursor.at);
  const { read, written } = utf8.encodeInto(value, cursor.bytes.subarray(cursor.at, cursor.at + room));
  if (read < value.length) throw new RangeError(`Text exceeds "${room}" bytes`);
  cursor.bytes[lengthAt] = written;
  cursor.at += written;
}
function getText(cursor: Cursor): string {
  const encoded = readBytes(cursor, u8.get(cursor));
  try {
    return strictUtf8.decode(encoded);
  } catch {
    cursor.bad = true;
    return "";
  }
}

/** Anything but a name could pass for a line of somebody else on a terminal, or move its cursor. */
function getPeerName(cursor: Cursor): string {
  const name = getText(cursor);
  cursor.bad ||= userName(name) !== name;
  return name;
}

function putEndpoint(cursor: Cursor, value: Endpoint): void {
  const { host, port } = parseEndpoint(value)!, octets = octetsOf(host)!;
  u8.put(cursor, octets.length);
  for (const octet of octets) u8.put(cursor, octet);
  u16.put(cursor, port);
}
function getEndpoint(cursor: Cursor): Endpoint {
  const length = u8.get(cursor), address = readBytes(cursor, length), port = u16.get(cursor);
  cursor.bad ||= (length !== 4 && (length !== 16 || isIPv4Mapped(address))) || port === 0;
  return cursor.bad ? "" : formatEndpoint(formatAddress(address), port);
}

function putEndpointOrNone(cursor: Cursor, value: Endpoint): void {
  if (value === "") u8.put(cursor, 0);
  else putEndpoint(cursor, value);
}
function getEndpointOrNone(cursor: Cursor): Endpoint {
  if (cursor.bad || cursor.bytes[cursor.at] !== 0) return getEndpoint(cursor);
  u8.get(cursor);
  return "";
}

function putNatClass(cursor: Cursor, { mapping, filtering, allocation }: NatClass): void {
  const code = MAPPINGS.indexOf(mapping) + 4 * FILTERINGS.indexOf(filtering) + 16 * ALLOCATIONS.indexOf(allocation);
  u8.put(cursor, code);
}
function getNatClass(cursor: Cursor): NatClass {
  const code = u8.get(cursor);
  const mapping = MAPPINGS[code & 3]!, filtering = FILTERINGS[code >> 2 & 3]!, allocation = ALLOCATIONS[code >> 4];
  cursor.bad ||= allocation === undefined;
  return { mapping, filtering, allocation: allocation ?? "unknown" };
}

function putTerms(cursor: Cursor, { version, flag }: Terms): void {
  u8.put(cursor, 2 * version + Number(flag));
}
function getTerms(cursor: Cursor): Terms {
  const code = u8.get(cursor);
  return { version: code >> 1, flag: code % 2 === 1 };
}

function list<T>(item: Codec<T>, most: number): Codec<T[]> {
  return {
    put(cursor, values) {
      if (values.length > most) throw new RangeError(`List exceeds "${most}" items`);
      u8.put(cursor, values.length);
      for (const value of values) item.put(cursor, value);
    },
    get(cursor) {
      const length = u8.get(cursor), values: T[] = [];
      cursor.bad ||= length > most;
      while (values.length < length && !cursor.bad) values.push(item.get(cursor));
      return values;
    },
  };
}

function record<S extends Shape>(shape: S): Codec<Values<S>> {
  return {
    put(cursor, values) {
      for (const name in shape) shape[name]!.put(cursor, values[name]);
    },
    get(cursor) {
      const values = {} as Values<S>;
      for (const name in shape) values[name] = shape[name]!.get(cursor) as Values<S>[typeof name];
      return values;
    },
  };
}

// ---------------------------------------------------------------------------------------------------- datagrams
// From a message to its bytes and back. A message is written into `scratch`, where its length shows, and leaves in the
// one new buffer that is then queued and sent. Nothing here knows who may say what: decoding says only that the bytes
// make sense, `verifies` and `openPeer` that they are genuine.

/** First byte of every datagram of ours; STUN's is 0 to 3 (RFC 8489, section 5), so that one port can serve both. */
export const MAGIC = 0x50;
/** Largest datagram in bytes: passes every path with the IPv6 minimum MTU of 1,280, tunnels included. */
export const MAX_DATAGRAM_BYTES = 1200;
/** Smallest datagram from a client in bytes: the size of COOKIE, so that no answer to a stranger exceeds its question. */
export const MIN_CLIENT_BYTES = 65;
/** Most bytes of a chat message that one datagram carries: leaves room for the relay's and the introduction's fields. */
export const MAX_PART_BYTES = 800;
/** Largest datagram between clients that the server passes on: with the largest introduction around it, it still fits. */
export const MAX_RELAYED_BYTES = 907;

const CONTROL_HEADER = record({ id, counter: u48 }), PEER_HEADER = record({ index: u32, counter: u48 });
const CONTROL_HEADER_BYTES = 16, PEER_HEADER_BYTES = 12, MAC_BYTES = 8, TAG_BYTES = 16; // magic and code are counted
const CONTROL_BY_CODE = byCode(CONTROL), PEER_BY_CODE = byCode(PEER), HANDSHAKE_BY_CODE = byCode(HANDSHAKE);

function byCode(table: Record<string, Row>): ({ type: string; codec: Codec<object> } | undefined)[] {
  const rows = [];
  for (const [type, { code, codec }] of Object.entries(table)) rows[code] = { type, codec };
  return rows;
}

const scratch = new Uint8Array(MAX_DATAGRAM_BYTES), scratchMac = new Uint8Array(MAC_BYTES);
/** The place in `scratch` after magic and code; at the end there is room for a seal. */
const writer = (sealBytes = 0): Cursor => ({ bytes: scratch, at: 2, end: MAX_DATAGRAM_BYTES - sealBytes, bad: false });
const reader = (data: Uint8Array, at = 0, end = data.length): Cursor => ({ bytes: data, at, end, bad: false });

/** Writes magic, code and, at the cursor, the fields. */
function write(cursor: Cursor, message: { type: string }): Cursor {
  const { code, codec } = ROWS[message.type]!;
  scratch[0] = MAGIC;
  scratch[1] = code;
  codec.put(cursor, message);
  return cursor;
}

/** Reads the fields of such a message; null unless they are valid, and end where the cursor does. */
function read(row: (typeof PEER_BY_CODE)[number], cursor: Cursor) {
  const fields = row?.codec.get(cursor);
  return row && isWhole(cursor) ? { ...fields, type: row.type } : null;
}

const isWhole = ({ bad, at, end }: Cursor) => !bad && at === end;
/** Whether a datagram could be one of ours. */
const isOurs = (data: Uint8Array) => data.length >= 2 && data.length <= MAX_DATAGRAM_BYTES && data[0] === MAGIC;

/** Whether a client may say it. Such a message is padded, since a datagram must not be smaller than what answers it. */
export const isFromClient = (type: Control["type"]): boolean => CONTROL[type].way !== "S -> C";

/**
 * Encodes a control message. A client's is padded with zeros to MIN_CLIENT_BYTES.
 *
 * @param message what to say
 * @param seal the 8-byte id (16 hex digits), the counter (under 2^48) and the 16-byte MAC key; without a key the MAC is 0
 * @throws {RangeError} if it does not fit into a datagram
 */
export function encode(
  message: ControlBody,
  seal: { id: string; counter: number; key?: Uint8Array | undefined },
): Uint8Array {
  const cursor = writer(MAC_BYTES);
  CONTROL_HEADER.put(cursor, seal);
  write(cursor, message);
  const macAt = isFromClient(message.type) ? Math.max(cursor.at, MIN_CLIENT_BYTES - MAC_BYTES) : cursor.at;
  const data = scratch.fill(0, cursor.at, macAt + MAC_BYTES).slice(0, macAt + MAC_BYTES);
  if (seal.key) sipHash(seal.key, data.subarray(0, macAt), data.subarray(macAt));
  return data;
}

/** The header of a control message, or null if it cannot be one: what costs least to read. */
export function controlHeader(data: Uint8Array): { id: string; counter: number } | null {
  if (!isOurs(data) || !CONTROL_BY_CODE[data[1]!] || data.length < CONTROL_HEADER_BYTES + MAC_BYTES) return null;
  return CONTROL_HEADER.get(reader(data, 2));
}

/** Decodes a control message, or null. Says nothing yet about who sent it: see `verifies`. */
export function decode(data: Uint8Array): Control | null {
  const header = controlHeader(data);
  if (!header) return null;
  const { type, codec } = CONTROL_BY_CODE[data[1]!]!;
  const cursor = reader(data, CONTROL_HEADER_BYTES, data.length - MAC_BYTES);
  const fields = codec.get(cursor);
  if (data.length === MIN_CLIENT_BYTES && isFromClient(type as Control["type"])) {
    while (cursor.at < cursor.end && data[cursor.at] === 0) cursor.at++;
  }
  return isWhole(cursor) ? { ...fields, ...header, type } as Control : null;
}

/** Whether the MAC at the end of a control message was made with this key. */
export function verifies(data: Uint8Array, key: Uint8Array): boolean {
  const macAt = data.length - MAC_BYTES;
  sipHash(key, data.subarray(0, macAt), scratchMac);
  let difference = 0; // all bytes are compared: how long it takes must not tell how many are right
  for (let i = 0; i < MAC_BYTES; i++) difference |= scratchMac[i]! ^ data[macAt + i]!;
  return difference === 0;
}

/** Encodes one of the two messages of the handshake. */
export const encodeHandshake = (message: Handshake): Uint8Array => scratch.slice(0, write(writer(), message).at);

/** Decodes one of the two messages of the handshake, or null. */
export function decodeHandshake(data: Uint8Array): Handshake | null {
  return isOurs(data) ? read(HANDSHAKE_BY_CODE[data[1]!], reader(data, 2)) as Handshake | null : null;
}

/** The bytes of a peer message as they travel inside the first message of a handshake: code, then fields. */
export const encodeInner = (message: Peer): Uint8Array => scratch.slice(1, write(writer(), message).at);

/** Decodes what `encodeInner` has made, or null. */
export function decodeInner(inner: Uint8Array): Peer | null {
  return read(PEER_BY_CODE[inner[0]!], reader(inner, 1)) as Peer | null;
}

/** Bytes of a clock, in front of that. */
export const CLOCK_BYTES = 6;
/** Encodes a clock, in ms. */
export const encodeClock = (ms: number): Uint8Array => {
  const cursor = reader(new Uint8Array(CLOCK_BYTES));
  u48.put(cursor, ms);
  return cursor.bytes;
};
/** Decodes what `encodeClock` has made. */
export const decodeClock = (bytes: Uint8Array): number => u48.get(reader(bytes));

/** Seals a peer message for the session that the other side knows by `index`; `counter` must never repeat for a key. */
export function sealPeer(message: Peer, seal: { index: number; counter: number; key: Uint8Array }): Uint8Array {
  const cursor = writer(TAG_BYTES);
  PEER_HEADER.put(cursor, seal);
  write(cursor, message);
  const ad = scratch.subarray(0, PEER_HEADER_BYTES), text = scratch.subarray(PEER_HEADER_BYTES, cursor.at);
  return concat(ad, ...encrypt(seal.key, { counter: seal.counter, ad, text }));
}

/** The clear header of a sealed peer message, or null if it cannot be one. */
export function peerHeader(data: Uint8Array): { index: number; counter: number } | null {
  if (!isOurs(data) || !PEER_BY_CODE[data[1]!] || data.length < PEER_HEADER_BYTES + TAG_BYTES) return null;
  return PEER_HEADER.get(reader(data, 2));
}

/** Opens a sealed peer message with the key of the session that its header names; null if it is not genuine. */
export function openPeer(data: Uint8Array, key: Uint8Array): Peer | null {
  const header = peerHeader(data);
  if (!header) return null;
  const ad = data.subarray(0, PEER_HEADER_BYTES);
  const inner = decrypt(key, { counter: header.counter, ad, text: data.subarray(PEER_HEADER_BYTES) });
  return inner && read(PEER_BY_CODE[data[1]!], reader(inner)) as Peer | null;
}

// ==================================================================================================== reference
// Skip this at first reading, and go on with server.ts: text, STUN, MACs and counters, limits, keys, encryption, Noise,
// sockets, the command line and traces.

// ---------------------------------------------------------------------------------------------------- text
// What others have written is shown on terminals: names, messages and reasons must not be able to do harm there.

/** Longest user name in bytes of UTF-8. */
export const MAX_NAME_BYTES = 32;
/** More than four combining marks in a row would cover the lines above and below; what is between does not count. */
const TOO_MANY_MARKS = /((?:\p{M}\p{Cf}*){4})((?:\p{M}\p{Cf}*)+)/gu;
const BLANK = /[\s\p{Z}\u2800]/u, CANNOT_BE_SEEN = /[\p{C}\p{Default_Ignorable_Code_Point}]/u;

/** The scripts in use today (UAX #31, tables 5 and 7). */
const SCRIPTS = `
  Latin Greek Cyrillic Armenian Hebrew Arabic Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu Kannada
  Malayalam Sinhala Thai Lao Tibetan Myanmar Georgian Ethiopic Khmer Thaana Han Hangul Hiragana Katakana Bopomofo
  Adlam Balinese Bamum Batak Canadian_Aboriginal Cham Chakma Cherokee Hanifi_Rohingya Javanese Kayah_Li Lepcha
  Limbu Lisu Mandaic Meetei_Mayek Miao Mongolian New_Tai_Lue Newa Nko Nyiakeng_Puachue_Hmong Ol_Chiki Osage
  Saurashtra Sundanese Syloti_Nagri Syriac Tai_Le Tai_Tham Tai_Viet Tifinagh Vai Wancho Yi`.trim().split(/\s+/);
/** Those that are written together: Japanese, Korean and Chinese (UTS #39, section 5.1). */
const TOGETHER = ["Han Hiragana Katakana", "Han Hangul", "Han Bopomofo"];
const patterns = new Map<string, RegExp>(); // made when they are needed, as all at once take 20 ms (Deno)

function isWrittenIn(scripts: string, letters: string): boolean {
  const classes = () => scripts.split(" ").map((script) => `\\p{scx=${script}}`).join("");
  const pattern = patterns.get(scripts) ?? new RegExp(`^[${classes()}]*$`, "u");
  patterns.set(scripts, pattern);
  return pattern.test(letters);
}

/** Whether all letters are of one script; signs and digits belong to none. */
function isOfOneScript(text: string): boolean {
  const letters = text.replace(/[\p{scx=Common}\p{scx=Inherited}]/gu, "");
  return [...SCRIPTS, ...TOGETHER].some((scripts) => isWrittenIn(scripts, letters));
}

/** What is wrong with a name that is normalised already, in words; null: nothing. */
function faultOf(name: string): string | null {
  if (name === "") return "it is empty";
  if (utf8.encode(name).length > MAX_NAME_BYTES) return `it is longer than ${MAX_NAME_BYTES} bytes`;
  if (BLANK.test(name)) return "it has blanks in it";
  if (CANNOT_BE_SEEN.test(name)) return "something in it cannot be seen";
  if (name.search(TOO_MANY_MARKS) >= 0) return "it has more than four marks on one letter";
  return isOfOneScript(name) ? null : "it mixes letters of several scripts, which may look like those of another name";
}

/** Why this is not a user name, in words; null: it is one. */
export const nameFault = (name: string): string | null => faultOf(name.normalize("NFKC"));

/**
 * Normalises a user name (NFKC, so that no two look the same by being encoded in another way), and checks it: 1 to 32
 * bytes of UTF-8, no blanks, nothing that cannot be seen, letters of one script. Null if it is not a name.
 */
export function userName(name: string): string | null {
  if (/^[!-~]{1,32}$/.test(name)) return name;
  const normal = name.normalize("NFKC");
  return faultOf(normal) === null ? normal : null;
}

/** What turns a text around, or ends a line where no line ends. */
const DECEPTIVE = /[\u2028\u2029\p{Bidi_Control}]/gu;

/** Changes all combining marks beyond four in a row. */
const fewerMarks = (text: string, change: (mark: string) => string) =>
  text.replace(TOO_MANY_MARKS, (_all, four: string, more: string) => four + more.replace(/\p{M}/gu, change));

/** An event as a line of JSON, in which nothing of a peer's text acts on a terminal. */
export function jsonLine(event: unknown): string {
  const escaped = (letter: string) =>
    letter.split("").map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`).join("");
  return fewerMarks(JSON.stringify(event), escaped).replace(DECEPTIVE, escaped).replace(/[\x7f-\x9f]/g, escaped);
}

/** A text that others have written, as one line of a terminal, on which nothing in it acts. */
export const harmless = (text: string): string =>
  fewerMarks(text.replace(DECEPTIVE, ""), () => "").replace(/(?!\t)\p{Cc}/gu, "\ufffd");

// ---------------------------------------------------------------------------------------------------- STUN
//
//     0      2        4        8                20     22       24
//     +------+--------+--------+----------------+------+--------+-------+-----
//     | type | length | cookie | transaction id | type | length | value | ...     RFC 8489, sections 5 and 14
//     +------+--------+--------+----------------+------+--------+-------+-----
//
// Binding only. Nobody has to prove who he is: user names, integrity and the attributes of ICE are passed over.

/** What classic STUN (RFC 3489) does not have: there these 4 bytes are a part of the transaction id. */
export const STUN_COOKIE = "2112a442";
/** The attribute that asks for an answer from another address or port (RFC 5780, section 7.2). */
export const STUN_CHANGE_REQUEST = 0x0003;
/** The attribute that asks for an answer to another port of the asker's (RFC 5780, section 7.5). */
export const STUN_RESPONSE_PORT = 0x0027;

const STUN_KINDS = { request: 0x0001, indication: 0x0011, response: 0x0101, error: 0x0111 };
const XOR_MAPPED_ADDRESS = 0x20, ERROR_CODE = 0x09, UNKNOWN_ATTRIBUTES = 0x0a, FINGERPRINT = 0x8028; // RFC 8489, 18.3
const MESSAGE_INTEGRITY = 0x08, MESSAGE_INTEGRITY_SHA256 = 0x1c;
const RESPONSE_ORIGIN = 0x802b, OTHER_ADDRESS = 0x802c; // RFC 5780, section 7
const MAPPED_ADDRESS = 0x01, SOURCE_ADDRESS = 0x04, CHANGED_ADDRESS = 0x05; // RFC 3489, section 11.2
/**
 * Attributes that must be understood and that may be passed over here: USERNAME, PASSWORD, ERROR-CODE,
 * UNKNOWN-ATTRIBUTES, REFLECTED-FROM, REALM, NONCE, PASSWORD-ALGORITHM, USERHASH, PRIORITY, USE-CANDIDATE and PADDING,
 * whose answer is not padded. RESPONSE-ADDRESS (RFC 3489) is not among them, since it would aim us at others.
 */
const STUN_PASSED_OVER = [0x06, 0x07, 0x09, 0x0a, 0x0b, 0x14, 0x15, 0x1d, 0x1e, 0x24, 0x25, 0x26];
/** From here on an attribute need not be understood (RFC 8489, section 14). */
const STUN_OPTIONAL = 0x8000;
const STUN_HEADER_BYTES = 20, STUN_CHANGE_IP = 4, STUN_CHANGE_PORT = 2, STUN_FINGERPRINT_MASK = 0x5354554e;

/** A STUN Binding message. */
export interface Stun {
  /** Its class. */ kind: "request" | "response" | "error" | "indication";
  /** The 16 bytes after the length, as hex digits: cookie and id; in classic STUN the id alone. */ transaction: string;
  /** Where the server sees the client: XOR-MAPPED-ADDRESS, or else MAPPED-ADDRESS. */ mapped?: Endpoint | undefined;
  /** Where the server answers from: RESPONSE-ORIGIN, or SOURCE-ADDRESS. */ origin?: Endpoint | undefined;
  /** The server's other address and port: OTHER-ADDRESS, or CHANGED-ADDRESS. */ other?: Endpoint | undefined;
  /** CHANGE-REQUEST: answer from your other address. */ changeIp: boolean;
  /** CHANGE-REQUEST: answer from another port. */ changePort: boolean;
  /** RESPONSE-PORT: answer to this port of mine. */ responsePort?: number | undefined;
  /** Attributes that must be understood and are not. */ unknown: number[];
  /** It has no cookie: RFC 3489. */ classic: boolean;
}

type Attribute = readonly [type: number, value: number[]];
const words = (...values: number[]) => values.flatMap((value) => [value >> 8, value & 255]);

function stunMessage(kind: Stun["kind"], transaction: string, attributes: Attribute[]): Uint8Array {
  const body = attributes.flatMap(([type, value]) => {
    const padding = [0, 0, 0].slice(0, -value.length & 3);
    return [...words(type, value.length), ...value, ...padding];
  });
  const data = new Uint8Array(STUN_HEADER_BYTES + body.length), cursor = reader(data);
  for (const word of [STUN_KINDS[kind], body.length]) u16.put(cursor, word);
  putDigits(cursor, transaction);
  data.set(body, cursor.at);
  return data;
}

/** Port and address are masked with cookie and id, so that no NAT rewrites them in passing (RFC 8489, section 14.2). */
const masked = (octets: Iterable<number>, mask: ArrayLike<number> = NO_BYTES) =>
  Array.from(octets, (octet, i) => octet ^ (mask[i] ?? 0));

function stunAddress(endpoint: Endpoint, mask?: Uint8Array): number[] {
  const { host, port } = parseEndpoint(endpoint)!, octets = octetsOf(host)!;
  return [...words(octets.length === 4 ? 1 : 2), ...masked(words(port), mask), ...masked(octets, mask)];
}

function stunEndpoint(value: Uint8Array, mask?: Uint8Array): Endpoint | "" {
  if (value.length !== [-1, 8, 20][value[1]!]) return ""; // of family 1, IPv4, or 2, IPv6
  const [high, low] = masked(value.subarray(2, 4), mask) as [number, number], port = high << 8 | low;
  return port > 0 ? formatEndpoint(formatAddress(Uint8Array.from(masked(value.subarray(4), mask))), port) : "";
}

/** Decodes a STUN Binding message (RFC 8489, section 5), or null: also if it has a FINGERPRINT that is wrong. */
export function decodeStun(data: Uint8Array): Stun | null {
  const cursor = reader(data);
  const type = u16.get(cursor), length = u16.get(cursor), id = readBytes(cursor, 16);
  const kind = (Object.keys(STUN_KINDS) as Stun["kind"][]).find((kind) => STUN_KINDS[kind] === type);
  if (cursor.bad || !kind || length !== data.length - STUN_HEADER_BYTES || length % 4 !== 0) return null;
  const transaction = hex(id), classic = !transaction.startsWith(STUN_COOKIE);
  const stun: Stun = { kind, transaction, changeIp: false, changePort: false, unknown: [], classic };
  const address = (value: Uint8Array, mask?: Uint8Array) => {
    const endpoint = stunEndpoint(value, mask);
    cursor.bad ||= endpoint === "";
    return endpoint;
  };
  let isSealed = false;
  while (cursor.at < cursor.end && !cursor.bad) {
    const at = cursor.at, type = u16.get(cursor), length = u16.get(cursor), value = readBytes(cursor, length);
    readBytes(cursor, -length & 3);
    if (cursor.bad) break;
    if (type === FINGERPRINT) { // the last attribute, over all before it (RFC 8489, section 14.7)
      const sum = (crc32(data.subarray(0, at)) ^ STUN_FINGERPRINT_MASK) >>> 0;
      if (cursor.at !== cursor.end || length !== 4 || u32.get(reader(value)) !== sum) return null;
    } else if (isSealed) continue; // nobody vouches for what follows MESSAGE-INTEGRITY (section 14.5)
    else if (type === MESSAGE_INTEGRITY || type === MESSAGE_INTEGRITY_SHA256) isSealed = true;
    else if (type === XOR_MAPPED_ADDRESS) stun.mapped = address(value, id);
    else if (type === MAPPED_ADDRESS) stun.mapped ??= address(value);
    else if (type === RESPONSE_ORIGIN || type === SOURCE_ADDRESS) stun.origin ??= address(value);
    else if (type === OTHER_ADDRESS || type === CHANGED_ADDRESS) stun.other ??= address(value);
    else if (type === STUN_CHANGE_REQUEST) {
      const flags = u32.get(reader(value));
      cursor.bad = length !== 4;
      stun.changeIp = (flags & STUN_CHANGE_IP) !== 0;
      stun.changePort = (flags & STUN_CHANGE_PORT) !== 0;
    } else if (type === STUN_RESPONSE_PORT) {
      stun.responsePort = u16.get(reader(value));
      cursor.bad = length !== 4 || stun.responsePort === 0;
    } else if (type < STUN_OPTIONAL && !STUN_PASSED_OVER.includes(type)) stun.unknown.push(type);
  }
  return cursor.bad ? null : stun;
}

/** Encodes a Binding request; `transaction` is STUN_COOKIE and 24 unpredictable hex digits, or 32 for classic STUN. */
export function encodeStunRequest(
  request: { transaction: string; changeIp?: boolean | undefined; changePort?: boolean | undefined },
): Uint8Array {
  const { transaction, changeIp = false, changePort = false } = request;
  const flags = (changeIp ? STUN_CHANGE_IP : 0) + (changePort ? STUN_CHANGE_PORT : 0);
  return stunMessage("request", transaction, flags > 0 ? [[STUN_CHANGE_REQUEST, words(0, flags)]] : []);
}

/**
 * Encodes the answer to a Binding request, as small as it can be: without SOFTWARE, and MAPPED-ADDRESS for classic
 * clients only, though RFC 5780, section 6.1 wants it for all. If the request has attributes that we do not know, it is
 * an error 420 that names them (RFC 8489, section 6.3.1).
 */
export function encodeStunResponse(
  request: Stun,
  answer: { mapped: Endpoint; origin?: Endpoint | undefined; other?: Endpoint | undefined },
): Uint8Array {
  const { transaction, classic, unknown } = request, { mapped, origin, other } = answer;
  if (unknown.length > 0) {
    const even = classic && unknown.length % 2 > 0 ? unknown.slice(-1) : []; // RFC 3489, section 11.2.10
    return stunMessage("error", transaction, [
      [ERROR_CODE, [0, 0, 4, 20]],
      [UNKNOWN_ATTRIBUTES, words(...unknown, ...even)],
    ]);
  }
  const attributes: Attribute[] = [
    classic
      ? [MAPPED_ADDRESS, stunAddress(mapped)]
      : [XOR_MAPPED_ADDRESS, stunAddress(mapped, Uint8Array.fromHex(transaction))],
  ];
  if (origin) attributes.push([classic ? SOURCE_ADDRESS : RESPONSE_ORIGIN, stunAddress(origin)]);
  if (other) attributes.push([classic ? CHANGED_ADDRESS : OTHER_ADDRESS, stunAddress(other)]);
  return stunMessage("response", transaction, attributes);
}

// ---------------------------------------------------------------------------------------------------- MACs and counters
// A MAC shows that a datagram comes from somebody who has the key; a window of counters, that it is not an old one
// again.

/**
 * SipHash-2-4 (Aumasson and Bernstein, 2012): eight bytes that nobody can guess without the 16-byte key, written into
 * `mac`. It is written out in 32-bit halves, because it guards every datagram of the server, and `createHmac` costs
 * more than an echo.
 */
export function sipHash(key: Uint8Array, data: Uint8Array, mac: Uint8Array = new Uint8Array(8)): Uint8Array {
  const word = (from: Uint8Array, at: number) =>
    (from[at]! | from[at + 1]! << 8 | from[at + 2]! << 16 | from[at + 3]! << 24) | 0;
  const k0 = word(key, 0), k0h = word(key, 4), k1 = word(key, 8), k1h = word(key, 12);
  let a = k0 ^ 0x70736575, ah = k0h ^ 0x736f6d65, b = k1 ^ 0x6e646f6d, bh = k1h ^ 0x646f7261;
  let c = k0 ^ 0x6e657261, ch = k0h ^ 0x6c796765, d = k1 ^ 0x79746573, dh = k1h ^ 0x74656462;
  const whole = data.length >> 3;
  for (let block = 0; block <= whole + 1; block++) {
    let m = 0, mh = 0, rounds = 2;
    if (block < whole) {
      m = word(data, 8 * block);
      mh = word(data, 8 * block + 4);
    } else if (block === whole) { // what is left over, and the length in the last byte
      for (let i = 8 * whole; i < data.length; i++) {
        if (i % 8 < 4) m |= data[i]! << 8 * (i % 8);
        else mh |= data[i]! << 8 * (i % 8 - 4);
      }
      mh |= data.length << 24;
    } else { // finalisation
      c ^= 0xff;
      rounds = 4;
    }
    d ^= m;
    dh ^= mh;
    for (let round = 0; round < rounds; round++) {
      let low = (a >>> 0) + (b >>> 0), t = b;
      ah = (ah + bh + (low > 0xffffffff ? 1 : 0)) | 0, a = low | 0;
      b = (b << 13 | bh >>> 19) ^ a, bh = (bh << 13 | t >>> 19) ^ ah;
      t = a, a = ah, ah = t;
      low = (c >>> 0) + (d >>> 0), t = d;
      ch = (ch + dh + (low > 0xffffffff ? 1 : 0)) | 0, c = low | 0;
      d = (d << 16 | dh >>> 16) ^ c, dh = (dh << 16 | t >>> 16) ^ ch;
      low = (a >>> 0) + (d >>> 0), t = d;
      ah = (ah + dh + (low > 0xffffffff ? 1 : 0)) | 0, a = low | 0;
      d = (d << 21 | dh >>> 11) ^ a, dh = (dh << 21 | t >>> 11) ^ ah;
      low = (c >>> 0) + (b >>> 0), t = b;
      ch = (ch + bh + (low > 0xffffffff ? 1 : 0)) | 0, c = low | 0;
      b = (b << 17 | bh >>> 15) ^ c, bh = (bh << 17 | t >>> 15) ^ ch;
      t = c, c = ch, ch = t;
    }
    a ^= m;
    ah ^= mh;
  }
  const low = a ^ b ^ c ^ d, high = ah ^ bh ^ ch ^ dh;
  for (let i = 0; i < 8; i++) mac[i] = (i < 4 ? low : high) >>> 8 * (i & 3);
  return mac;
}

/** Remembers which counters have been seen, up to 2,048 behind the highest (the idea is RFC 6479's). */
export interface ReplayWindow {
  /** The highest so far, -1 at first. */ highest: number;
  /** A bit for each of the last 2,048. */ seen: Uint32Array;
}
const WINDOW_BITS = 2048;

/** A window that has seen nothing. */
export function replayWindow(): ReplayWindow {
  const { buffer, byteOffset } = keep(new Uint8Array(WINDOW_BITS / 8));
  return { highest: -1, seen: new Uint32Array(buffer, byteOffset, WINDOW_BITS / 32) };
}

/** Whether the counter is behind the window, or has been seen: then nobody need look at its seal. */
export function isSeen({ highest, seen }: ReplayWindow, counter: number): boolean {
  const bit = seen[(counter % WINDOW_BITS) >> 5]! & 1 << (counter & 31);
  return counter <= highest - WINDOW_BITS || (counter <= highest && bit !== 0);
}

/** Whether the counter is new; from then on it is not. Call it only for what a seal has proved genuine. */
export function accept(window: ReplayWindow, counter: number): boolean {
  if (isSeen(window, counter)) return false;
  for (let i = Math.max(window.highest + 1, counter - WINDOW_BITS + 1); i <= counter; i++) {
    window.seen[(i % WINDOW_BITS) >> 5]! &= ~(1 << (i & 31)); // the window moves over these slots: they are free again
  }
  window.highest = Math.max(window.highest, counter);
  window.seen[(counter % WINDOW_BITS) >> 5]! |= 1 << (counter & 31);
  return true;
}

// ---------------------------------------------------------------------------------------------------- limits
// How often something may happen that costs us or others something. A limit is one number and a rate.

/** What a limit allows: `burst` at once, `perSecond` from then on. */
export interface Rate {
  /** How much comes back in a second. */ perSecond: number;
  /** Most at once. */ burst: number;
}

/** Times since 1970 are rounded when they are added: by less than this in all, in a burst of thousands. */
const ROUNDING_MS = 0.1;

/**
 * The generic cell rate algorithm (ITU-T I.371). The number is the theoretical arrival time (TAT) in ms: when all that
 * has been let through would have come at the steady rate. It is 0 at first, and one that has passed is as good as 0.
 *
 * @returns the next TAT if `cost` more conforms at `now`, or null if it is too much
 */
export function conform(tat: number, { perSecond, burst }: Rate, now: number, cost = 1): number | null {
  const next = Math.max(tat, now) + cost / perSecond * 1000;
  return next - now <= burst / perSecond * 1000 + ROUNDING_MS ? next : null;
}

/** One limit: whether something of this cost may happen now (ms). What is refused costs nothing. */
export type Limit = (now: number, cost?: number) => boolean;

/** Makes a limit that nothing has been taken from. */
export function createLimit(rate: Rate): Limit {
  let tat = 0;
  return (now, cost) => {
    const next = conform(tat, rate, now, cost);
    tat = next ?? tat;
    return next !== null;
  };
}

// ---------------------------------------------------------------------------------------------------- keys
// X25519 (RFC 7748) lets two ends agree on a secret of which both public keys show nothing; HKDF makes keys of it.
// What node:crypto returns is copied, since it is a Buffer, whose `slice` makes a view where that of an array copies.

/** An X25519 key pair, 32 bytes each. */
export interface KeyPair {
  /** Never leaves this program. */ secret: Uint8Array;
  /** Everybody may know it. */ public: Uint8Array;
}

// The fixed beginnings of PKCS #8 and SubjectPublicKeyInfo for X25519 (RFC 8410); the 32 bytes of the key follow.
const PKCS8 = Uint8Array.fromHex("302e020100300506032b656e04220420");
const SPKI = Uint8Array.fromHex("302a300506032b656e032100");
const pem = (label: string, head: Uint8Array, key: Uint8Array) =>
  `-----BEGIN ${label}-----\n${concat(head, key).toBase64()}\n-----END ${label}-----\n`;

/** What node:crypto makes of a secret. It is made once, since that costs half as much as using it (Bun). */
const privateKeys = new WeakMap<Uint8Array, KeyObject>();

function privateKey(secret: Uint8Array): KeyObject {
  let key = privateKeys.get(secret);
  if (!key) privateKeys.set(secret, key = createPrivateKey(pem("PRIVATE KEY", PKCS8, secret)));
  return key;
}

/** The key pair of a 32-byte secret. */
export function keysFrom(secret: Uint8Array): KeyPair {
  const spki = createPublicKey(privateKey(secret)).export({ format: "der", type: "spki" });
  return { secret, public: new Uint8Array(spki.subarray(-32)) };
}

/** A fresh key pair from the operating system's randomness: any 32 bytes are a secret (RFC 7748, section 5). */
export const generateKeys = (): KeyPair => keysFrom(new Uint8Array(randomBytes(32)));

/** The secret of two key pairs; null for a key of low order and for everything else that node:crypto would throw at. */
export function diffieHellman(secret: Uint8Array, theirs: Uint8Array): Uint8Array | null {
  try {
    const publicKey = createPublicKey(pem("PUBLIC KEY", SPKI, theirs));
    const shared = new Uint8Array(x25519({ privateKey: privateKey(secret), publicKey }));
    return shared.some((byte) => byte !== 0) ? shared : null;
  } catch {
    return null;
  }
}

/** HKDF-SHA-256 (RFC 5869). */
export function deriveKey(secret: Uint8Array, options: { salt: Uint8Array; info: string; length: number }): Uint8Array {
  return new Uint8Array(hkdfSync("sha256", secret, options.salt, options.info, options.length));
}

const sha256 = (data: Uint8Array) => new Uint8Array(createHash("sha256").update(data).digest());

/** The MAC keys of a session, 16 bytes a direction, from the X25519 secret of its two ends and the server's token. */
export function controlKeys(shared: Uint8Array, token: string): { toServer: Uint8Array; toClient: Uint8Array } {
  const both = keep(deriveKey(shared, { salt: utf8.encode(token), info: "punch control", length: 32 }));
  return { toServer: both.subarray(0, 16), toClient: both.subarray(16) };
}

/** The MAC key of LOGIN and of a refusal, 16 bytes, from the X25519 secret of the two ends and the login's id. */
export function loginKey(shared: Uint8Array, id: string): Uint8Array {
  return deriveKey(shared, { salt: utf8.encode(id), info: "punch login", length: 16 });
}

/**
 * The nonce by which others know a login. It follows from the id, which only its client and the server know, and the id
 * must not follow from it: whoever knew that could answer a LOGIN in the server's place.
 */
export const publicNonce = (id: string): string => hex(sha256(utf8.encode(`punch nonce ${id}`)).subarray(0, 8));

/**
 * What a client and the server agree on if there is a password: the X25519 secret of the two, and the password's key.
 * The session's keys come of it, so that neither side can pass for one that knows the password.
 */
export function withPassword(shared: Uint8Array, password: Uint8Array): Uint8Array {
  return deriveKey(shared, { salt: password, info: "punch password", length: 32 });
}

/** What proves in LOGIN that one knows the password, 8 bytes as hex, of what `withPassword` returns and the login's id. */
export function passwordProof(agreed: Uint8Array, id: string): string {
  return hex(deriveKey(agreed, { salt: utf8.encode(id), info: "punch proof", length: 8 }));
}

/** 32 letters and digits without look-alikes. */
const LETTERS = "abcdefghijkmnpqrstuvwxyz23456789";
/** 20 of them for 20 bytes: 100 bits that are easy to read out and to type. */
const inLetters = (bytes: Uint8Array) =>
  Array.from(bytes.subarray(0, 20), (byte) => LETTERS[byte % 32]).join("").replace(/.{4}(?!$)/g, "$&-");

/** What people compare, or type, to know the key of a server: 20 letters and digits (100 bits of its hash). */
export const fingerprintOf = (key: Uint8Array): string => inLetters(sha256(concat(utf8.encode("punch server"), key)));

/** A fingerprint that somebody has typed, as `fingerprintOf` writes it; null if it cannot be one. */
export function parseFingerprint(typed: string): string | null {
  const letters = typed.toLowerCase().replace(/[\s-]/g, "");
  return new RegExp(`^[${LETTERS}]{20}$`).test(letters) ? letters.replace(/.{4}(?!$)/g, "$&-") : null;
}

/** A new secret for two colleagues: 100 bits. */
export const newSecret = (): string => inLetters(randomBytes(20));

/** What two people compare aloud: 40 digits (132 bits) of the hash of both public keys, the same on both sides. */
export function safetyCode(one: Uint8Array, other: Uint8Array): string {
  const [first, second] = hex(one) < hex(other) ? [one, other] : [other, one];
  const digest = BigInt("0x" + hex(sha256(concat(utf8.encode("punch verify"), first, second))));
  return (digest % 10n ** 40n).toString().padStart(40, "0").replace(/(\d{5})(?!$)/g, "$1 ");
}

// ---------------------------------------------------------------------------------------------------- encryption
// AES-256-GCM: `text` becomes unreadable, and neither it nor `ad`, the additional data, can be changed without notice.

type Sealed = { counter: number; ad: Uint8Array; text: Uint8Array };
/** The 12-byte nonce of Noise's AESGCM: four zeros, then the counter (Noise revision 34, section 12.4). */
const nonce = new Uint8Array(12);

function nonceOf(counter: number): Uint8Array {
  u48.put(reader(nonce, 6), counter);
  return nonce;
}

/** The encrypted text and its tag, in pieces. */
function encrypt(key: Uint8Array, { counter, ad, text }: Sealed): Uint8Array[] {
  const cipher = createCipheriv("aes-256-gcm", key, nonceOf(counter)).setAAD(ad);
  return [cipher.update(text), cipher.final(), cipher.getAuthTag()];
}

function decrypt(key: Uint8Array, { counter, ad, text }: Sealed): Uint8Array | null {
  if (text.length < TAG_BYTES) return null;
  try {
    const decipher = createDecipheriv("aes-256-gcm", key, nonceOf(counter), { authTagLength: TAG_BYTES });
    decipher.setAAD(ad).setAuthTag(text.subarray(-TAG_BYTES));
    const opened = decipher.update(text.subarray(0, -TAG_BYTES)); // all of it: GCM has no blocks to fill
    decipher.final(); // throws if the tag is wrong
    return new Uint8Array(opened);
  } catch {
    return null;
  }
}

// ---------------------------------------------------------------------------------------------------- Noise
// Noise KKpsk0 (noiseprotocol.org, revision 34, sections 5, 7 and 9). Both know the other's static key and the PSK:
//
//     -> psk, e, es, ss      the first may carry a payload already: readable only by the peer, sent only by us
//     <- e, ee, se           from here on, keys that no theft of the static keys uncovers
//
// Each key of a handshake encrypts one payload, hence always with the counter 0.

/** What both sides know before a handshake, and the fresh key of this one. */
export interface NoiseOptions {
  /** Our static keys. */ own: KeyPair;
  /** The other side's static public key. */ peer: Uint8Array;
  /** 32 bytes that both know; zeros if there is no secret. */ psk: Uint8Array;
  /** What else both must agree on. */ prologue: Uint8Array;
  /** Fresh keys for this handshake alone. */ ephemeral: KeyPair;
}

/** What comes out of a handshake: one key a direction, and the hash that names the session. */
export interface NoiseKeys {
  /** AES-256 key of what we send. */ send: Uint8Array;
  /** AES-256 key of what we receive. */ receive: Uint8Array;
  /** The handshake hash, the same on both sides. */ hash: Uint8Array;
}

const NOISE_NAME = utf8.encode("Noise_KKpsk0_25519_AESGCM_SHA256"); // exactly 32 bytes, hence its own hash

/** The symmetric state of section 5.2: h, ck and k. */
type SymmetricState = { hash: Uint8Array; chain: Uint8Array; key: Uint8Array };

const mixHash = (state: SymmetricState, data: Uint8Array) => ({ ...state, hash: sha256(concat(state.hash, data)) });

/** What both know before the first message: prologue and static keys, and the token psk, which is MixKeyAndHash. */
function initialState({ psk, prologue }: NoiseOptions, initiator: Uint8Array, responder: Uint8Array): SymmetricState {
  const out = deriveKey(psk, { salt: NOISE_NAME, info: "", length: 96 });
  const state = { hash: NOISE_NAME, chain: out.subarray(0, 32), key: out.subarray(64) };
  return [prologue, initiator, responder, out.subarray(32, 64)].reduce(mixHash, state);
}

/** The tokens of a message: e, which beside a PSK counts as key material too (section 9.2), and what was agreed on. */
function mixTokens(state: SymmetricState, e: Uint8Array, ...agreed: Uint8Array[]): SymmetricState {
  return [e, ...agreed].reduce((state, secret) => {
    const out = deriveKey(secret, { salt: state.chain, info: "", length: 64 });
    return { ...state, chain: out.subarray(0, 32), key: out.subarray(32) };
  }, mixHash(state, e));
}

/** The keys of the session: of what the initiator sends, and of what the responder sends. */
function split({ chain }: SymmetricState): [Uint8Array, Uint8Array] {
  const out = deriveKey(NO_BYTES, { salt: chain, info: "", length: 64 });
  return [out.subarray(0, 32), out.subarray(32)];
}

/** The initiator's half of a handshake. */
export interface Initiation {
  /** The first message. */ message: Uint8Array;
  /** Makes keys of the answer; null if that is not genuine: then it may be called again with another one. */
  finish(second: Uint8Array): { payload: Uint8Array; keys: NoiseKeys } | null;
}

/** Begins a handshake; null if the peer's key is of low order. */
export function initiate(options: NoiseOptions, payload: Uint8Array): Initiation | null {
  const { own, peer, ephemeral } = options;
  const es = diffieHellman(ephemeral.secret, peer), ss = diffieHellman(own.secret, peer);
  if (!es || !ss) return null;
  const first = mixTokens(initialState(options, own.public, peer), ephemeral.public, es, ss);
  const sealed = concat(...encrypt(first.key, { counter: 0, ad: first.hash, text: payload }));
  return {
    message: concat(ephemeral.public, sealed),
    finish(message) {
      const theirs = message.subarray(0, 32), answer = message.subarray(32);
      const ee = diffieHellman(ephemeral.secret, theirs), se = diffieHellman(own.secret, theirs);
      if (!ee || !se) return null;
      const second = mixTokens(mixHash(first, sealed), theirs, ee, se);
      const payload = decrypt(second.key, { counter: 0, ad: second.hash, text: answer });
      const [send, receive] = split(second);
      return payload && { payload, keys: { send, receive, hash: mixHash(second, answer).hash } };
    },
  };
}

/** Answers a handshake: the payload of its first message, and what makes the second; null if it is not genuine. */
export function respond(
  options: NoiseOptions,
  message: Uint8Array,
): { payload: Uint8Array; answer(payload: Uint8Array): { message: Uint8Array; keys: NoiseKeys } } | null {
  const { own, peer, ephemeral } = options;
  const theirs = message.slice(0, 32), sealed = message.slice(32); // copied, since `answer` may be called later
  const es = diffieHellman(own.secret, theirs), ss = diffieHellman(own.secret, peer);
  if (!es || !ss) return null;
  const first = mixTokens(initialState(options, peer, own.public), theirs, es, ss);
  const payload = decrypt(first.key, { counter: 0, ad: first.hash, text: sealed });
  return payload && {
    payload,
    answer(payload) {
      // Neither is null: a key of low order is one for every secret, and has been found out above.
      const ee = diffieHellman(ephemeral.secret, theirs)!, se = diffieHellman(ephemeral.secret, peer)!;
      const second = mixTokens(mixHash(first, sealed), ephemeral.public, ee, se);
      const answer = concat(...encrypt(second.key, { counter: 0, ad: second.hash, text: payload }));
      const [receive, send] = split(second);
      return { message: concat(ephemeral.public, answer), keys: { send, receive, hash: mixHash(second, answer).hash } };
    },
  };
}

// ---------------------------------------------------------------------------------------------------- sockets
// `listen` runs a machine on real UDP sockets: the only place with a socket or a timer. It knows nothing of messages.

/** A machine at work on real sockets. */
export interface Running<Event> {
  /** The port of each socket, in the order asked for. */ ports: number[];
  /** Does what a call of the machine has returned, and sets the timer. For the calls that `listen` does not make. */
  perform(effects: Effect<Event>[]): void;
  /** Closes all sockets. */ close(): void;
}

/** How to run a machine. */
export interface ListenOptions<Event> {
  /** Where to bind sockets 0, 1, ...; port 0 for any. */ sockets: { host: string; port: number }[];
  /** Called with each event of the machine. */ onEvent(event: Event): void;
  /** Called with each datagram, for traces. */
  onDatagram?: ((way: "in" | "out", other: Endpoint, data: Uint8Array) => void) | undefined;
}

const LONGEST_TIMER_MS = 60_000;
/** A machine that has failed when its timer fired gets no other one sooner: it would only fail again. */
const REST_MS = 100;

const MAX_SHOWN = 32, shown = new Set<string>();

/** Shows a bug of ours on stderr, unless it has been shown. */
function showOnce(error: unknown): void {
  const text = String((error as Error | undefined)?.stack ?? error);
  if (shown.has(text) || shown.size >= MAX_SHOWN) return;
  shown.add(text);
  writeSome(2, utf8.encode(`${text}\n`));
}

/** Milliseconds since 1970 that never go back while the program runs. */
export const clock = (): number => performance.timeOrigin + performance.now();

/**
 * Runs a machine on UDP sockets of Deno or Bun until it is closed.
 *
 * @throws what the runtime throws for a port or address that cannot be bound, with that `port`
 */
export async function listen<Event>(machine: Machine<Event>, options: ListenOptions<Event>): Promise<Running<Event>> {
  const sockets: (Udp | undefined)[] = [];
  const unwanted = new Set<number>(); // sockets that the machine has closed before they were open
  let timer: ReturnType<typeof setTimeout> | undefined, dueAt = Infinity, open = true, restsUntil = 0;

  /** Whatever goes wrong in a step of ours is shown once, and stops neither the sockets nor the timer. */
  function isDone(step: () => void): boolean {
    try {
      step();
      return true;
    } catch (error) {
      showOnce(error);
      return false;
    }
  }

  /** Tells the machine what has happened, and does what it wants. False: it has failed. */
  function tell(what: () => Effect<Event>[]): boolean {
    const done = isDone(() => perform(what()));
    if (!done) isDone(schedule);
    return done;
  }

  const receiver = (socket: number): OnData => (data, from) => {
    if (options.onDatagram) isDone(() => options.onDatagram!("in", from, data));
    tell(() => machine.receive({ socket, from, data }, clock()));
  };

  function perform(effects: Effect<Event>[]): void {
    for (const effect of effects) if (open) isDone(() => carryOut(effect));
    schedule();
  }

  function carryOut(effect: Effect<Event>): void {
    if (effect.kind === "event") options.onEvent(effect.event);
    else if (effect.kind === "send") {
      options.onDatagram?.("out", effect.to, effect.data);
      const to = parseEndpoint(effect.to);
      if (to) sockets[effect.socket]?.send(effect.data, to, effect.ttl);
    } else if (effect.kind === "close") {
      if (!sockets[effect.socket]) unwanted.add(effect.socket);
      sockets[effect.socket]?.close();
      delete sockets[effect.socket];
    } else { // to punch through IPv4 NATs, and with a TTL
      openWithTtl("0.0.0.0", 0, receiver(effect.socket)).then((udp) => {
        if (!open || unwanted.delete(effect.socket)) return udp.close();
        sockets[effect.socket] = udp;
        opened(effect.socket, udp.port);
      }, () => opened(effect.socket, 0));
    }
  }

  const opened = (socket: number, port: number) => tell(() => machine.opened(socket, port, clock()));

  function schedule(): void {
    const at = machine.wakeAt();
    if (at === dueAt || !open) return;
    clearTimeout(timer);
    dueAt = at;
    const waitMs = Math.max(at, restsUntil) - clock();
    if (at !== Infinity) timer = setTimeout(wake, Math.min(Math.max(waitMs, 0), LONGEST_TIMER_MS));
  }

  function wake(): void {
    dueAt = Infinity;
    const done = tell(() => clock() >= machine.wakeAt() ? machine.wake(clock()) : []);
    if (done) return;
    restsUntil = clock() + REST_MS;
    dueAt = NaN; // to be set again, for later
    isDone(schedule);
  }

  function close(): void {
    open = false;
    clearTimeout(timer);
    for (const udp of sockets) udp?.close();
  }

  for (const [socket, { host, port }] of options.sockets.entries()) {
    sockets[socket] = await openUdp(host, port, receiver(socket)).catch((error) => {
      close();
      throw Object.assign(error, { port });
    });
  }
  const ports = sockets.map((udp) => udp!.port);
  for (const [socket, port] of ports.entries()) opened(socket, port);
  return { ports, perform: (effects) => void isDone(() => perform(effects)), close };
}

/** The TTL of a datagram that does not ask for one. */
const DEFAULT_TTL = 64;
/** Larger datagrams are dropped unread. Ours are smaller; a STUN request may be padded to a full Ethernet frame or more. */
const MAX_READ_BYTES = 2_048;

interface Udp {
  port: number;
  send(data: Uint8Array, to: { host: string; port: number }, ttl?: number): void;
  close(): void;
}
type OnData = (data: Uint8Array, from: Endpoint) => void;

const openUdp = (host: string, port: number, onData: OnData) =>
  "Deno" in globalThis ? openDeno(host, port, onData) : openBun(host, port, onData);

/** Deno's own UDP socket cannot set a TTL. Node's can, but for the next datagram only once the one before has left. */
const openWithTtl = (host: string, port: number, onData: OnData) =>
  "Deno" in globalThis ? openNode(host, port, onData) : openBun(host, port, onData);

/** A dual-stack socket shows IPv4 addresses as `::ffff:192.0.2.1`; link-local ones may carry a zone. */
const plainHost = (host: string) =>
  host.startsWith("::ffff:") && host.includes(".") ? host.slice(7) : host.replace(/%.*/, "");

/** Datagrams handed over and not yet taken by the kernel: more would only pile up in memory (Deno). */
const MAX_SENDS_IN_FLIGHT = 256;

/** Sends one after the other, since sends that do not wait for each other overtake each other. */
function inOrder<T>(send: (datagram: T) => Promise<unknown>): (datagram: T) => void {
  const waiting: T[] = [];
  let busy = false;
  const sendAll = async () => {
    busy = true;
    for (let next; (next = waiting.shift());) await send(next).catch(() => {});
    busy = false;
  };
  return (datagram) => {
    if (waiting.length < MAX_SENDS_IN_FLIGHT) waiting.push(datagram);
    if (!busy) sendAll();
  };
}

// deno-lint-ignore require-await
async function openDeno(hostname: string, port: number, onData: OnData): Promise<Udp> {
  if (!Deno.listenDatagram) {
    throw new Failure(
      "Deno keeps its UDP sockets behind a flag, start it with: deno run --unstable-net --allow-net ...",
    );
  }
  const socket = Deno.listenDatagram({ transport: "udp", hostname, port });
  let open = true;
  const send = inOrder(async (datagram: [Uint8Array, Deno.NetAddr]) => {
    if (open) await socket.send(...datagram);
  });
  const receiveAll = async () => {
    const buffer = new Uint8Array(MAX_READ_BYTES + 1); // one more, so that a datagram that is too long is noticed
    while (open) {
      const received = await socket.receive(buffer).catch(() => null);
      if (!received && open) await new Promise((resolve) => setTimeout(resolve, 1));
      else if (received && received[0].length <= MAX_READ_BYTES) {
        const from = received[1] as Deno.NetAddr;
        onData(received[0], formatEndpoint(plainHost(from.hostname), from.port));
      }
    }
  };
  receiveAll();
  return {
    port: (socket.addr as Deno.NetAddr).port,
    send(data, { host, port }) {
      if (open) send([data, { transport: "udp", hostname: host, port }]);
    },
    close() {
      if (open) socket.close();
      open = false;
    },
  };
}

async function openNode(host: string, port: number, onData: OnData): Promise<Udp> {
  const socket = createSocket("udp4");
  let open = true;
  const send = inOrder(([data, to, ttl]: [Uint8Array, { host: string; port: number }, number]) =>
    new Promise((sent) => {
      if (!open) return sent(null);
      socket.setTTL(ttl);
      socket.send(data, to.port, to.host, sent);
    })
  );
  socket.on("message", (data, from) => {
    if (open && data.length <= MAX_READ_BYTES) onData(data, formatEndpoint(from.address, from.port));
  });
  await new Promise<void>((resolve, reject) => socket.on("error", reject).bind(port, host, resolve));
  return {
    port: socket.address().port,
    send(data, to, ttl = DEFAULT_TTL) {
      if (open && isIP(to.host) === 4) send([data, to, ttl]);
    },
    close() {
      if (open) socket.close();
      open = false;
    },
  };
}

/** Datagrams read and not yet handled, and how many are handled before timers and signals get their turn (Bun). */
const MAX_INBOX = 2048, INBOX_SLICE = 256;
/** Errors of an earlier datagram that Linux reports at the next, innocent one; sending that again succeeds (Bun). */
const STALE_ERRORS = ["ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH"], STALE_RETRIES = 3;

async function openBun(hostname: string, port: number, onData: OnData): Promise<Udp> {
  let inbox: [Uint8Array, Endpoint][] = [], scheduled = false, open = true;
  const schedule = () => {
    if (!scheduled) setImmediate(work);
    scheduled = true;
  };
  const work = () => { // in slices, since Bun reads a flood to its end before any timer fires
    scheduled = false;
    for (const [data, from] of inbox.splice(0, INBOX_SLICE)) {
      if (!open) return;
      onData(data, from);
    }
    if (inbox.length > 0) schedule();
  };
  const socket = await Bun.udpSocket({
    hostname,
    port,
    socket: {
      data(_socket, data, port, address) {
        if (data.length > MAX_READ_BYTES || inbox.length >= MAX_INBOX) return;
        inbox.push([data, formatEndpoint(plainHost(address), port)]);
        schedule();
      },
      error() {}, // ICMP errors of datagrams past: the timers of the machine notice what matters
    },
  });
  return {
    port: socket.port,
    send(data, to, ttl) {
      if (ttl !== undefined && open) socket.setTTL(ttl);
      for (let attempt = 0; open && attempt <= STALE_RETRIES; attempt++) {
        try {
          socket.send(data, to.port, to.host);
          break;
        } catch (error) {
          if (!STALE_ERRORS.includes((error as { code?: string }).code ?? "")) break;
        }
      }
      if (ttl !== undefined && open) socket.setTTL(DEFAULT_TTL);
    },
    close() {
      open = false;
      inbox = [];
      socket.close();
    },
  };
}

// ---------------------------------------------------------------------------------------------------- command line
// What the two programs share: how they end, what they bind, and where secrets come from.

/** The port of the 2004 original. */
export const DEFAULT_PORT = 2280;

/** Writes what can be written at once, without waiting for a reader; what fails counts as written: nobody can read it. */
function writeSome(fd: 1 | 2, bytes: Uint8Array): Promise<number> {
  // Not node:fs on Deno: there it waits for the reader, and everything else waits with it.
  if ("Deno" in globalThis) return (fd === 1 ? Deno.stdout : Deno.stderr).write(bytes).catch(() => bytes.length);
  return new Promise((resolve) =>
    writeTo(fd, bytes, (error, written) => {
      if (error?.code === "EAGAIN") setTimeout(resolve, TELL_LOST_MS / 10, 0);
      else resolve(error ? bytes.length : written);
    })
  );
}

const MAX_WAITING_CHARACTERS = 256 * 1024, TELL_LOST_MS = 1_000;

/**
 * A log whose reader may be slow, or gone: writing never waits and never fails. Lines beyond 256 Ki characters that wait,
 * or beyond the rate, are left out, and a line says how many.
 *
 * @param fd the file descriptor: 1 or 2
 * @param leftOut what to say of so many lines that were left out
 */
export function createLog(fd: 1 | 2, leftOut: (lines: number) => string, rate?: Rate): (line: string) => void {
  const mayWrite = rate ? createLimit(rate) : () => true;
  let waiting = "", isWriting = false, lost = 0;

  async function flush(): Promise<void> {
    if (isWriting) return;
    isWriting = true;
    while (waiting !== "") {
      let bytes = utf8.encode(waiting);
      waiting = "";
      while (bytes.length > 0) bytes = bytes.subarray(await writeSome(fd, bytes));
    }
    isWriting = false;
  }
  function tellLost(): void {
    if (waiting.length > MAX_WAITING_CHARACTERS / 2) return void setTimeout(tellLost, TELL_LOST_MS);
    waiting += `${leftOut(lost)}\n`;
    lost = 0;
    flush();
  }

  return (line) => {
    if (waiting.length + line.length <= MAX_WAITING_CHARACTERS && mayWrite(clock(), 1)) waiting += `${line}\n`;
    else if (lost++ === 0) setTimeout(tellLost, TELL_LOST_MS);
    flush();
  };
}

/** Something that the user must type differently: exit code 2. */
export class UsageError extends Error {}

/** Something that stands in the way and that the message names: exit code 1. */
export class Failure extends Error {}

/** Ends the program with one line on stderr. A bug of ours keeps its stack. */
export function exitWith(error: unknown): never {
  const isOurs = error instanceof UsageError || error instanceof Failure;
  console.error(isOurs ? error.message : error);
  if (error instanceof UsageError) console.error("Try --help");
  process.exit(error instanceof UsageError ? 2 : 1);
}

/**
 * Runs a machine on the given host; without one on `::`, which is IPv4 too, or on IPv4 alone if the host has no IPv6.
 *
 * @throws {Failure} if the port cannot be bound; with `json` stdout says so too
 */
export async function listenOrFail<T>(
  run: (host: string) => Promise<T>,
  { host, json }: { host?: string | undefined; json: boolean },
): Promise<T> {
  try {
    return await run(host ?? "::").catch((error) => {
      if (host !== undefined || (error as { code?: string }).code === "EADDRINUSE") throw error;
      return run("0.0.0.0");
    });
  } catch (error) {
    const { code, message, port } = error as { code?: string; message: string; port?: number };
    const reasons: Record<string, string> = {
      EADDRINUSE: "address already in use, choose another with --port",
      EADDRNOTAVAIL: "this host has no such address",
      EACCES: "permission denied, choose one above 1023 with --port",
    };
    const failure = error instanceof Failure
      ? error
      : new Failure(`Cannot bind UDP port "${port}": ${reasons[code ?? ""] ?? message}`);
    if (json) console.log(JSON.stringify({ event: "error", code: "bind", message: failure.message }));
    throw failure;
  }
}

/** The names of a program's options: those without a value, those with one, and those with one if there is a `=`. */
export interface OptionNames<Flag extends string, Value extends string> {
  /** Given or not. */ flags: Flag[];
  /** With a value. */ values: Value[];
  /** With a value behind a `=`, or else with the empty string. */ optional: Value[];
}
/** The options that were given, by name, and what else stands on the command line. */
export type Arguments<Flag extends string, Value extends string> = {
  options: { [Name in Flag]?: boolean } & { [Name in Value]?: string };
  others: string[];
};

/**
 * Reads the command line.
 *
 * @throws {UsageError} for an option that there is not, for one without its value, and for a value where none belongs
 */
export function readArguments<Flag extends string, Value extends string>(
  { flags, values, optional }: OptionNames<Flag, Value>,
): Arguments<Flag, Value> {
  const args: string[] = [], argv = process.argv.slice(2);
  while (argv.length > 0 && argv[0] !== "--") {
    const arg = argv.shift()!, name = arg.slice(2) as Value;
    // node:util knows no optional value, it would take the next word for one; nor a value that begins with "-".
    if (arg.startsWith("--") && optional.includes(name)) args.push(`${arg}=`);
    else if (arg.startsWith("--") && values.includes(name) && argv.length > 0 && !argv[0]!.startsWith("--")) {
      args.push(`${arg}=${argv.shift()}`);
    } else args.push(arg);
  }
  args.push(...argv);
  const options: ParseArgsConfig["options"] = {};
  for (const name of flags) options[name] = { type: "boolean", ...name === "help" ? { short: "h" } : {} };
  for (const name of [...values, ...optional]) options[name] = { type: "string" };
  try {
    const found = parseArgs({ args, options, allowPositionals: true });
    return { options: found.values as Arguments<Flag, Value>["options"], others: found.positionals };
  } catch (error) {
    throw new UsageError((error as Error).message.split(/\. |\.?\n/)[0]);
  }
}

// Secrets come from files, from the terminal or from the environment. Where one is expected and cannot be had, that is
// an error: a program that went on without it would seem to be safe.

/** Whether Deno lets us see an environment variable. It is not asked for: the answer would come too late for others. */
const isVisible = (variable: string) =>
  !("Deno" in globalThis) || Deno.permissions.querySync({ name: "env", variable }).state === "granted";

/** An environment variable; undefined too if Deno has not been allowed to look. */
export const environment = (variable: string): string | undefined =>
  isVisible(variable) ? process.env[variable] : undefined;

/** Says on stderr which of these variables do not count because Deno may not look at them. */
export function tellInvisible(variables: string[]): void {
  const invisible = variables.filter((variable) => !isVisible(variable));
  if (invisible.length === 0) return;
  const names = invisible.join(" and "), flag = `--allow-env=${invisible.join(",")}`;
  console.error(`${names} cannot be seen and count for nothing: Deno needs ${flag}`);
}

/** Where a secret or a password may come from. */
export interface SecretSource {
  /** A file; "-" asks for it on the terminal. */ file?: string | undefined;
  /** The environment variable that counts if there is no file. */ variable: string;
  /** What to call it. */ label: "secret" | "password";
}

/**
 * Words that only some people know: from a file, typed unseen for the file "-", or else from the environment; undefined
 * if there are none.
 *
 * @throws {Failure} if there are to be some and they cannot be had, or are blank
 */
export async function secretWords({ file, variable, label }: SecretSource): Promise<string | undefined> {
  const given = file === undefined
    ? environment(variable)
    : file === "-"
    ? await typedUnseen(label)
    : readPrivate(file, label);
  if (given === undefined || given.trim() !== "") return given?.trim();
  if (file === undefined) throw new Failure(`${variable} is blank: unset it, or put the ${label} into it`);
  throw new Failure(file === "-" ? `No ${label} was typed` : `The ${label} file "${file}" is empty`);
}

/** What is typed on the terminal, unseen. */
async function typedUnseen(label: string): Promise<string> {
  const { stdin, stderr } = process;
  if (!stdin.isTTY) throw new Failure(`The ${label} is to be typed ("-"), but there is no terminal: name a file`);
  stderr.write(`The ${label}: `);
  const unseen = new Writable({ write: (_chunk, _encoding, done) => done() });
  const terminal = createInterface({ input: stdin, output: unseen, terminal: true });
  const typed = await new Promise<string | null>((resolve) =>
    terminal.once("line", resolve).once("SIGINT", () => resolve(null)).once("close", () => resolve(""))
  );
  terminal.close();
  stderr.write("\n");
  if (typed === null) process.exit(130);
  return typed;
}

const MAX_PRIVATE_BYTES = 64 * 1024;

/**
 * What is in a file that is nobody else's business. Who else could read or change it is looked up on the file that has
 * been opened. Where modes mean nothing, or nobody can change them, a warning on stderr is all.
 *
 * @param what to call the file in errors
 * @throws {Failure} if it cannot be read, is open to others, is no UTF-8, or is too long
 */
export function readPrivate(file: string, what: string): string {
  const fail = (why: string) => new Failure(`Cannot read the ${what} file "${file}": ${why}`);
  mayUse("read", file, what);
  let fd: number | undefined;
  try {
    fd = openSync(file, "r");
    checkPrivate(fd, `the ${what} file "${file}"`);
    const bytes = readFileSync(fd);
    if (bytes.length > MAX_PRIVATE_BYTES) throw fail(`it has over ${MAX_PRIVATE_BYTES} bytes`);
    return strictUtf8.decode(bytes);
  } catch (error) {
    if (error instanceof Failure) throw error;
    throw fail(error instanceof TypeError ? "it is no text in UTF-8" : (error as Error).message);
  } finally {
    if (fd !== undefined) closeSync(fd);
  }
}

function checkPrivate(fd: number, which: string): void {
  const stat = fstatSync(fd), { mode, uid } = stat;
  if (stat.isDirectory()) throw new Error("it is a folder");
  // Who may not change a mode does not own the file (EPERM), which tells us where we may not ask who we are. On a
  // read-only mount nobody may (EROFS).
  const refusal = errorCodeOf(() => fchmodSync(fd, mode & 0o7777));
  const maySeeUid = !("Deno" in globalThis) ||
    Deno.permissions.querySync({ name: "sys", kind: "uid" }).state === "granted";
  const isOwn = uid === 0 || (maySeeUid ? uid === process.geteuid?.() : refusal !== "EPERM");
  if (isOwn && (mode & 0o077) === 0) return;
  const [fault, remedy] = isOwn
    ? ["Others can read or change", "chmod 600"]
    : ["Somebody else owns", "make it yours with chown"];
  if (process.platform !== "win32" && refusal !== "EROFS") throw new Failure(`${fault} ${which}: ${remedy}`);
  console.error(`${fault} ${which}, as far as its mode says, which cannot be changed here`);
}

function errorCodeOf(act: () => void): string | undefined {
  try {
    act();
  } catch (error) {
    return (error as { code?: string }).code;
  }
}

/**
 * Writes a file that nobody else may read, whole or not at all. If there is one by then, that stays as it is.
 *
 * @throws {Failure} if it cannot be written
 */
export function writePrivate(file: string, text: string, what: string): void {
  const directory = dirname(file), temporary = `${file}.${hex(randomBytes(4))}`;
  mayUse("read", directory, what);
  mayUse("write", directory, what);
  try {
    const fd = openSync(temporary, "wx", 0o600);
    try {
      writeFileSync(fd, text);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    // A link, unlike a renaming, fails if somebody else has been faster; some file systems have none.
    const code = errorCodeOf(() => linkSync(temporary, file));
    if (code === undefined || code === "EEXIST") unlinkSync(temporary);
    else renameSync(temporary, file);
  } catch (error) {
    errorCodeOf(() => unlinkSync(temporary));
    throw new Failure(`Cannot write the ${what} file "${file}": ${(error as Error).message}`);
  }
}

/** On Deno, asks on a terminal for the use of a file that the command line names, or else says which flag it takes. */
function mayUse(name: "read" | "write", path: string, what: string): void {
  if (path === "") throw new UsageError(`The file for the ${what} has no name`);
  if (!("Deno" in globalThis) || Deno.permissions.requestSync({ name, path }).state === "granted") return;
  throw new Failure(`Deno may not ${name} "${path}" for the ${what}: start it with --allow-${name}=${path}`);
}

/**
 * The keys in a file, which are made now if there is no such file.
 *
 * @throws {Failure} if they can be neither read nor made
 */
export function identityIn(file: string): KeyPair {
  mayUse("read", file, "identity");
  if (!existsSync(file)) writePrivate(file, `${hex(generateKeys().secret)}\n`, "identity");
  const digits = readPrivate(file, "identity").trim();
  if (/^[0-9a-f]{64}$/.test(digits)) return keysFrom(Uint8Array.fromHex(digits));
  throw new Failure(`"${file}" is not an identity: 64 hex digits; name another file, and it will be made`);
}

/** The 32-byte key of such words, by scrypt (RFC 7914): each guess costs a tenth of a second. */
export function keyFromWords(words: string, label: "secret" | "password", salt: Uint8Array = NO_BYTES): Uint8Array {
  const salted = concat(utf8.encode(`punch ${label}`), salt);
  return new Uint8Array(scryptSync(words.normalize("NFC"), salted, 32, { N: 2 ** 15, maxmem: 2 ** 26 }));
}

// ---------------------------------------------------------------------------------------------------- traces

/** A datagram in words, for traces: its name, what it says, and what can be read of it without a key. */
export function explain(data: Uint8Array): string {
  const stun = decodeStun(data);
  if (stun) {
    const { kind, changeIp, changePort, mapped } = stun;
    const asked = [changeIp && "change-ip", changePort && "change-port", mapped && `mapped=${mapped}`];
    return ["STUN Binding", kind, ...asked].filter(Boolean).join(" ");
  }
  const row = messageTable().find(({ code }) => isOurs(data) && code === data[1]);
  if (!row) return `${data.length} bytes that are not ours`;
  const shown = (value: unknown): string =>
    value instanceof Uint8Array
      ? value.length === 32 ? `key ${hex(value.subarray(0, 4))}..` : explain(value)
      : Array.isArray(value)
      ? `[${value.map(shown).join(", ")}]`
      : typeof value === "object"
      ? `{${Object.entries(value!).map(([name, field]) => `${name}: ${shown(field)}`).join(", ")}}`
      : harmless(String(value));
  const { type: _type, id: _id, counter: _counter, ...fields } = decode(data) ?? { type: "", id: "", counter: 0 };
  const details = Object.entries(fields).map(([name, value]) => ` ${name}=${shown(value)}`).join("");
  return `${row.name} (${row.what})${details}`;
}

/** Shows a datagram. */
export interface Trace {
  (way: "in" | "out", other: Endpoint, data: Uint8Array): void;
  /** From now on times count from here. */
  restart(): void;
}

/** Writes every datagram in words, with the time since the last `restart`. */
export function createTrace(write: (line: string) => void): Trace {
  let start = clock();
  const trace = (way: "in" | "out", other: Endpoint, data: Uint8Array) => {
    const ms = (clock() - start).toFixed(1).padStart(9);
    write(`${ms} ms ${way === "in" ? "<-" : "->"} ${other} ${explain(data)}`);
  };
  return Object.assign(trace, { restart: () => void (start = clock()) });
}

/**
 * The trace that `--trace[=FILE]` asks for: none without it, one by `write` without a file.
 *
 * @throws {Failure} if the file cannot be written
 */
export function openTrace(option: string | undefined, write: (line: string) => void): Trace | undefined {
  if (!option) return option === undefined ? undefined : createTrace(write);
  mayUse("write", option, "trace");
  try {
    const fd = openSync(option, "w", 0o600);
    let isFull = false; // or whatever else is wrong: datagrams leave all the same
    return createTrace((line) => {
      const code = isFull ? undefined : errorCodeOf(() => writeFileSync(fd, `${line}\n`));
      if (code === undefined) return;
      isFull = true;
      console.error(`The trace "${option}" ends here: ${code}`);
    });
  } catch (error) {
    throw new Failure(`Cannot write the trace "${option}": ${(error as Error).message}`);
  }
}
