/**
 * The wire, byte by byte, what strangers may do to it, and one conversation over real sockets.
 *
 * Whoever writes a second implementation starts with GOLDEN. How server and client behave is tested in lab/.
 *
 * @module
 */
import { assert, assertEquals, assertNotEquals, assertRejects, assertThrows } from "@std/assert";
import { createCipheriv, createHash } from "node:crypto";
import { type ClientEvent, type Command, createClient } from "./client.ts";
import { CONTROL, type ControlBody, type Handshake, messageTable, PEER, type Peer } from "./protocol.ts";
import { VERSION } from "./protocol.ts";
import { decode, decodeHandshake, decodeInner, encode, encodeHandshake, encodeInner, verifies } from "./protocol.ts";
import { MAX_CANDIDATES, MAX_DATAGRAM_BYTES, MAX_NAME_BYTES, MAX_PART_BYTES, MIN_CLIENT_BYTES } from "./protocol.ts";
import { explain, hex, jsonLine, openPeer, peerHeader, sealPeer, userName } from "./protocol.ts";
import { addressBytes, formatAddress, formatEndpoint, hostOf, isIPv6, parseEndpoint, scopeOf } from "./protocol.ts";
import { decodeStun, encodeStunRequest, encodeStunResponse, STUN_COOKIE } from "./protocol.ts";
import { accept, conform, createLimit, replayWindow, sipHash } from "./protocol.ts";
import { deriveKey, diffieHellman, generateKeys, keysFrom, safetyCode } from "./protocol.ts";
import { initiate, type NoiseOptions, respond } from "./protocol.ts";
import { clock, Failure, listen, listenOrFail, type Machine, type Running } from "./protocol.ts";
import { createServer } from "./server.ts";

const bytes = (digits: string) => Uint8Array.from(digits.replace(/\s/g, "").match(/../g) ?? [], (d) => parseInt(d, 16));
const utf8 = (text: string) => new TextEncoder().encode(text);
/** The bytes `from`, `from` + 1, ... */
const counting = (length: number, from = 0) => Uint8Array.from({ length }, (_, i) => from + i);
const flip = (data: Uint8Array, bit: number) => data.map((byte, i) => i === bit >> 3 ? byte ^ 1 << bit % 8 : byte);
const random = (length: number) => crypto.getRandomValues(new Uint8Array(length));

function aesGcm(key: Uint8Array, { nonce, ad, text }: Record<"nonce" | "ad" | "text", Uint8Array>): Uint8Array {
  const cipher = createCipheriv("aes-256-gcm", key, nonce).setAAD(ad);
  return Uint8Array.of(...cipher.update(text), ...cipher.final(), ...cipher.getAuthTag());
}

/** Random numbers under a limit, the same in each run (the generator of Numerical Recipes). */
const seeded = (seed: number) => (limit: number) => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return Math.floor(seed / 2 ** 32 * limit);
};

// ---------------------------------------------------------------------------------------------------- golden bytes

const SEAL = { id: "0123456789abcdef", counter: 0x1234_5678_9abc, key: counting(16) };
const PEER_SEAL = { index: 0xfeedbeef, counter: 258, key: counting(32) };
const HEAD = "0123456789abcdef 123456789abc", PEER_HEAD = "feedbeef 000000000102";
const KEY = counting(32, 0x40), KEY_HEX = hex(KEY), NONCE = "a1a2a3a4a5a6a7a8";
const V4 = "203.0.113.7:41000", V4_HEX = "04 cb007107 a028";
const V6 = "[2001:db8::1]:443", V6_HEX = "10 20010db8000000000000000000000001 01bb";
const NAT = { mapping: "APDM", filtering: "ADF", allocation: "random" } as const, NAT_HEX = "4b"; // 3 + 4 x 2 + 16 x 4
const ZOE = { name: "zoë", nonce: NONCE, key: KEY }, ZOE_HEX = `04 7a6fc3ab ${NONCE} ${KEY_HEX}`;
const BODY = utf8("body"), BODY_HEX = "0004 626f6479";
const ASKED = `000000000001 ${NONCE}`, asked = (fields: string) => `${ASKED} ${fields}`; // of ALIVE
const pad = (length: number) => "00".repeat(length);

const TERMS = { version: VERSION, flag: true }; // 2 * 3 + 1
/** Every message and its datagram: header, fields, padding, and the MAC or what is encrypted. */
const GOLDEN = ([
  [
    {
      type: "LOGIN",
      cookie: NONCE,
      key: KEY,
      proof: NONCE,
      terms: TERMS,
      direct: 1,
      rttMs: 300,
      name: "zoë",
      local: [V4, V6],
    },
    `50 01 ${HEAD} ${NONCE} ${KEY_HEX} ${NONCE} 07 01 012c 04 7a6fc3ab 02 ${V4_HEX} ${V6_HEX} f8891d63b16ce97b`,
  ],
  [{ type: "LOGOUT" }, `50 02 ${HEAD} ${pad(41)} 7880bcfc69e9a71a`],
  [
    { type: "P2PTRANS", to: "bob", nonce: NONCE, call: 1, body: BODY },
    `50 03 ${HEAD} 03 626f62 ${NONCE} 01 ${BODY_HEX} ${pad(22)} e4722cc32c8dc565`,
  ],
  [{ type: "GETALLUSER", prefix: "b", after: "bob" }, `50 04 ${HEAD} 01 62 03 626f62 ${pad(35)} c77382d4d633625a`],
  [{ type: "COOKIE", cookie: NONCE, key: KEY, terms: TERMS }, `50 05 ${HEAD} ${NONCE} ${KEY_HEX} 07 3f0648a788ea6731`],
  [
    {
      type: "WELCOME",
      token: NONCE,
      cookie: NONCE,
      kept: 1,
      public: V6,
      secondPort: 2281,
      thirdPort: 0,
      total: 70_000,
      users: [{ ...ZOE, public: V4 }],
    },
    `50 06 ${HEAD} ${NONCE} ${NONCE} 01 ${V6_HEX} 08e9 0000 00011170 01 ${ZOE_HEX} ${V4_HEX} 5095d9ae7e79c9bb`,
  ],
  [
    { type: "KEEPALIVE", cookie: NONCE, rttMs: 65_535, nat: NAT, local: [V4] },
    `50 07 ${HEAD} ${NONCE} ffff ${NAT_HEX} 01 ${V4_HEX} ${pad(22)} 39e034335c2d0450`,
  ],
  [
    { type: "ALIVE", asked: 2 ** 48 - 1, cookie: NONCE, public: V4 },
    `50 08 ${HEAD} ffffffffffff ${NONCE} ${V4_HEX} d5480feb6f9d9b8e`,
  ],
  [
    { type: "USERS", asked: 5, page: 258, last: 2, more: 1, total: 3, users: [{ ...ZOE, public: V6 }] },
    `50 09 ${HEAD} 000000000005 0102 02 01 00000003 01 ${ZOE_HEX} ${V6_HEX} 6c90558faa40bbed`,
  ],
  [
    { type: "INTRODUCTION", peer: { ...ZOE, candidates: [V4, V6], nat: NAT, punchAfterMs: 150 } },
    `50 0a ${HEAD} ${ZOE_HEX} 02 ${V4_HEX} ${V6_HEX} ${NAT_HEX} 0096 c6ae62a73f3dffb9`,
  ],
  [
    { type: "RELAYED", from: "bob", nonce: NONCE, body: BODY },
    `50 0b ${HEAD} 03 626f62 ${NONCE} ${BODY_HEX} 20771f4e5048ecbd`,
  ],
  [{ type: "PUNCHED", peer: "bob" }, `50 0c ${HEAD} 03 626f62 ${pad(37)} 0fe4706fe0fa83af`],
  [{ type: "ERROR", reason: "full", about: "", seconds: 61 }, `50 0d ${HEAD} 04 66756c6c 00 003d 7ac9605f7350c0a1`],
  [
    { type: "P2PMESSAGE", seq: 7, base: 5, left: 2, part: BODY },
    `50 64 ${PEER_HEAD} 0d281091649c1054261e0b6adf794c5582a17e3ed24aa4950566ddf5c7ed`,
  ],
  [
    { type: "P2PMESSAGEACK", next: 9, from: 4, states: BODY },
    `50 65 ${PEER_HEAD} 0d28109f649c105544730d7c503c0073079d3de4eb0be38071080b82`,
  ],
  [
    { type: "P2PSOMEONEWANTTOCALLYOU", peer: { ...ZOE, candidates: [], nat: NAT, punchAfterMs: 0 }, body: BODY },
    `50 66 ${HEAD} ${ZOE_HEX} 00 ${NAT_HEX} 0000 ${BODY_HEX} f689909f1a97608f`,
  ],
  [{ type: "P2PTRASH", probe: 1 }, `50 67 ${PEER_HEAD} 0d2810974f685d07d256853a040c7f96bc36d84c`],
  [{ type: "P2PECHO", probe: 2 ** 32 - 1 }, `50 68 ${PEER_HEAD} f2d7ef6993969c027fa12aacefcd0e8421caa316`],
  [{ type: "P2PFIRST", from: 1, probe: 2 ** 32 - 2, noise: BODY }, "50 69 00000001 fffffffe 626f6479"],
  [
    { type: "P2PSECOND", to: 1, from: 2, noise: BODY, sealed: KEY },
    `50 6a 00000001 00000002 ${BODY_HEX} ${KEY_HEX}`,
  ],
  [
    { type: "P2PPLAN", attempt: 1, spray: 0, ports: [1, 65_535] },
    `50 6b ${PEER_HEAD} 0c2812966563efa4d9691379a07362247b6f3e6cbd3a13`,
  ],
] satisfies [ControlBody | Peer | Handshake, string][]).map(([message, digits]) => ({ message, data: bytes(digits) }));

type Message = ControlBody | Peer | Handshake;
const isControl = (message: Message): message is ControlBody => message.type in CONTROL;
const isPeer = (message: Message): message is Peer => message.type in PEER;
const goldenOf = (type: Message["type"]) => GOLDEN.find(({ message }) => message.type === type)!.data;
const CONTROLS = GOLDEN.filter(({ message }) => isControl(message));
const PEERS = GOLDEN.filter(({ message }) => isPeer(message));

const write = (message: Message) =>
  isControl(message)
    ? encode(message, SEAL)
    : isPeer(message)
    ? sealPeer(message, PEER_SEAL)
    : encodeHandshake(message);
const read = (data: Uint8Array) => decode(data) ?? decodeHandshake(data) ?? openPeer(data, PEER_SEAL.key);
/** As `read` returns it. */
const withHeader = (message: Message) =>
  isControl(message) ? { ...message, id: SEAL.id, counter: SEAL.counter } : message;

Deno.test("messageTable() has no message without golden bytes, and each code once", () => {
  const table = messageTable().map(({ name, code }) => [name, code]);
  assertEquals(GOLDEN.map(({ message, data }) => [message.type, data[1]]), table);
  assertEquals(new Set(table.map(([, code]) => code)).size, table.length);
});

for (const { message, data } of GOLDEN) {
  Deno.test(`${message.type} has its golden bytes in both directions`, () => {
    assertEquals(hex(write(message)), hex(data));
    assertEquals(read(data), withHeader(message));
    assert(explain(data).startsWith(`${message.type} (`));
  });
}

Deno.test("verifies() accepts a control message for its own key and with no byte changed", () => {
  for (const { data } of CONTROLS) {
    assert(verifies(data, SEAL.key));
    assert(!verifies(data, counting(16, 1)));
    for (let at = 0; at < data.length; at++) assert(!verifies(flip(data, 8 * at), SEAL.key));
  }
});

Deno.test("openPeer() returns null for another key and for a flipped bit in header, body or tag", () => {
  for (const { data } of PEERS) {
    assertEquals(peerHeader(data), { index: PEER_SEAL.index, counter: PEER_SEAL.counter });
    assertEquals(openPeer(data, counting(32, 1)), null);
    for (let bit = 0; bit < 8 * data.length; bit++) assertEquals(openPeer(flip(data, bit), PEER_SEAL.key), null);
  }
});

Deno.test("decode() and openPeer() return keys and parts that outlive the datagram, whose buffer is used again", () => {
  const isKept = (name: string) => name === "key" || name === "part";
  const kept = (value: unknown): unknown[] =>
    typeof value !== "object" || value === null
      ? []
      : Object.entries(value).flatMap(([name, field]) =>
        isKept(name) ? [hex(field)] : field instanceof Uint8Array ? [] : kept(field)
      );
  let count = 0;
  for (const { message, data } of [...CONTROLS, ...PEERS]) {
    const buffer = Uint8Array.from(data), decoded = read(buffer);
    buffer.fill(0xdd);
    assertEquals(kept(decoded), kept(message), message.type);
    count += kept(message).length;
  }
  assertEquals(count, 7); // of LOGIN, COOKIE, WELCOME, USERS, INTRODUCTION, P2PMESSAGE and P2PSOMEONEWANTTOCALLYOU
});

Deno.test("sealPeer() is AES-256-GCM with the counter in Noise's nonce and the header as additional data", () => {
  const data = goldenOf("P2PTRASH"), nonce = bytes("00000000 0000000000000102");
  const sealed = aesGcm(PEER_SEAL.key, { nonce, ad: data.subarray(0, 12), text: bytes("00000001") });
  assertEquals(hex(data.subarray(12)), hex(sealed));
});

// ---------------------------------------------------------------------------------------------------- malformed bytes

Deno.test("decode() and its like return null for every truncation", () => {
  const fixed: Record<string, number> = { P2PFIRST: 10, P2PSECOND: 16 }; // the last field takes what there is
  for (const { message, data } of GOLDEN) {
    let decoded = 0;
    for (let length = 0; length < data.length; length++) {
      const cut = read(data.slice(0, length));
      if (cut && isControl(message)) assertEquals(cut, withHeader(message)); // only padding is gone: sizes are the server's
      if (cut) decoded++;
    }
    const padded = isControl(message) && data.length === MIN_CLIENT_BYTES && message.type !== "COOKIE";
    assertEquals(decoded, message.type in fixed ? data.length - fixed[message.type]! : Number(padded), message.type);
  }
  for (const { message } of PEERS) {
    const inner = encodeInner(message as Peer), fields = hex(inner).replace(/626f6479$/, "");
    for (let length = 0; length < fields.length / 2; length++) assertEquals(decodeInner(inner.slice(0, length)), null);
  }
});

Deno.test("decode() and openPeer() return null for a trailing byte", () => {
  for (const { data } of [...CONTROLS, ...PEERS]) {
    for (const byte of [0, 1]) assertEquals(read(Uint8Array.of(...data, byte)), null);
  }
  assertEquals(decodeInner(bytes("67 00000001")), { type: "P2PTRASH", probe: 1 });
  assertEquals(decodeInner(bytes("67 00000001 00")), null);
  assert(decodeInner(bytes(`6b 01 00 40 ${"1234".repeat(64)}`)));
  assertEquals(decodeInner(bytes(`6b 01 00 41 ${"1234".repeat(65)}`)), null);
});

Deno.test("decode() returns null for padding that is not zero, not needed or of the server", () => {
  for (let at = 16; at < 57; at++) assertEquals(decode(flip(goldenOf("LOGOUT"), 8 * at)), null);
  for (const length of [40, 42, 100]) assertEquals(decode(bytes(`50 02 ${HEAD} ${pad(length)} ${pad(8)}`)), null);
  assertEquals(decode(bytes(`50 08 ${HEAD} ${ASKED} ${V4_HEX} ${pad(28)} ${pad(8)}`)), null);
});

Deno.test("decode() and its like return null for a wrong magic, an unknown code and over 1,200 bytes", () => {
  const unknown = [...counting(256)].filter((code) => !GOLDEN.some(({ data }) => data[1] === code));
  for (const { data } of GOLDEN) {
    for (const magic of [0, 1, 2, 3, 0x4f, 0x51, 0xff]) {
      assertEquals(read(Uint8Array.of(magic, ...data.slice(1))), null);
    }
    for (const code of unknown) assertEquals(read(Uint8Array.of(0x50, code, ...data.slice(2))), null);
    assertEquals(read(Uint8Array.of(...data, ...new Uint8Array(1201 - data.length))), null);
  }
});

Deno.test("decode() returns null for fields that are not what they should be", () => {
  const rows: [what: string, head: string, good: string, ...bad: string[]][] = [
    ["UTF-8", "50 0c", "02 c3ab", "02 c328", "01 c3", "02 c0af", "03 eda080", "04 f4908080", "01 ff"],
    ["BOM", "50 0c", "06 efbbbf 626f62"],
    ["length", "50 0c", "03 626f62", "04 626f62", "02 626f62", "ff 626f62", ""],
    ["body", "50 0b", `00 ${NONCE} 0001 aa`, `00 ${NONCE} 0002 aa`, `00 ${NONCE} 0000 aa`, `00 ${NONCE} ffff aa`],
    ["family", "50 08", `${ASKED} ${V4_HEX}`, ...["00 0001", "03 cb0071 a028", "06 cb0071070000 a028"].map(asked)],
    ["IPv4-mapped", "50 08", `${ASKED} ${V6_HEX}`, asked(`10 ${pad(10)}ffff cb007107 a028`)],
    ["port", "50 08", `${ASKED} 04 cb007107 0001`, `${ASKED} 04 cb007107 0000`],
    ["own candidates", "50 07", `${NONCE} 0000 00 08 ${V4_HEX.repeat(8)}`, `${NONCE} 0000 00 09 ${V4_HEX.repeat(9)}`],
    ["NAT", "50 07", `${NONCE} 0000 4f 00`, `${NONCE} 0000 50 00`, `${NONCE} 0000 ff 00`],
    ["candidates", "50 0a", `${ZOE_HEX} 10 ${V6_HEX.repeat(16)} 00 0000`, `${ZOE_HEX} 11 ${V6_HEX.repeat(17)} 00 0000`],
  ];
  for (const [what, head, good, ...bad] of rows) {
    const datagram = (fields: string) => bytes(`${head} ${HEAD} ${fields} ${pad(8)}`);
    assert(decode(datagram(good)) && isCanonical(datagram(good)), what);
    for (const fields of bad) assertEquals(decode(datagram(fields)), null, `${what}: ${fields}`);
  }
});

/** Whether these bytes are the only ones that say what they say: a MAC aside, and padding, which may be missing. */
function isCanonical(data: Uint8Array): boolean {
  const message = decode(data), handshake = decodeHandshake(data), inner = decodeInner(data);
  const said = hex(data.subarray(0, -8)), again = message ? hex(encode(message, message).subarray(0, -8)) : said;
  return again.startsWith(said) && /^0*$/.test(again.slice(said.length)) &&
    (!handshake || hex(encodeHandshake(handshake)) === hex(data)) && (!inner || hex(encodeInner(inner)) === hex(data));
}

// A request that asks for another port, and answers as RFC 5769 (2.2, 2.3) and RFC 3489 have them.
const STUN_ID = "b7e7a701bc34d686fa87dfae";
const STUN_REQUEST = bytes(`0001 0008 2112a442 ${STUN_ID} 0003 0004 00000002`);
const STUN_SOFTWARE = "8022 000b 7465737420766563746f7220";
const STUN_V4 = bytes(
  `0101 003c 2112a442 ${STUN_ID} ${STUN_SOFTWARE} 0020 0008 0001a147e112a643 ` +
    "0008 0014 2b91f599fd9e90c38c7489f92af9ba53f06be7d7 8028 0004 c07d4c96",
);
const STUN_V6 = bytes(
  `0101 0048 2112a442 ${STUN_ID} ${STUN_SOFTWARE} ` +
    "0020 0014 0002a1470113a9faa5d3f179bc25f4b5bed2b9d9 " +
    "0008 0014 a382954e4be67bf11784c97c8292c275bfe3ed41 8028 0004 c8fb0b4c",
);
const STUN_CLASSIC = bytes(`0101 0018 00000000 ${STUN_ID} 0001 0008 0001a028cb007107 0004 0008 000108e8c0000201`);

Deno.test("decodeStun() reads the vectors of RFC 5769, and null for a flipped bit or a cut", () => {
  const rows = [[STUN_V4, "192.0.2.1:32853"], [STUN_V6, "[2001:db8:1234:5678:11:2233:4455:6677]:32853"]] as const;
  for (const [data, mapped] of rows) {
    const stun = decodeStun(data)!;
    assertEquals([stun.kind, stun.mapped, stun.unknown, stun.classic], ["response", mapped, [], false]);
    for (let bit = 0; bit < 8 * 48; bit++) assertEquals(decodeStun(flip(data, bit)), null, `bit ${bit}`);
    for (let bit = 8 * data.length - 32; bit < 8 * data.length; bit++) assertEquals(decodeStun(flip(data, bit)), null);
    for (let length = 0; length < data.length; length++) assertEquals(decodeStun(data.slice(0, length)), null);
  }
});

Deno.test("encodeStunRequest() and encodeStunResponse() have their golden bytes in both directions", () => {
  const transaction = STUN_COOKIE + STUN_ID;
  assertEquals(hex(encodeStunRequest({ transaction, changePort: true })), hex(STUN_REQUEST));
  const request = decodeStun(STUN_REQUEST)!;
  assertEquals(request, {
    kind: "request",
    transaction,
    changeIp: false,
    changePort: true,
    unknown: [],
    classic: false,
  });
  const answer = { mapped: V4, origin: "192.0.2.1:2280" };
  assertEquals(
    hex(encodeStunResponse({ ...request, classic: true, transaction: pad(4) + STUN_ID }, answer)),
    hex(STUN_CLASSIC),
  );
  for (const mapped of [V4, V6]) assertEquals(decodeStun(encodeStunResponse(request, { mapped }))?.mapped, mapped);
  const unknown = hex(encodeStunResponse({ ...request, unknown: [0x7fff] }, answer));
  assertEquals(unknown, hex(bytes(`0111 0010 2112a442 ${STUN_ID} 0009 0004 00000414 000a 0002 7fff0000`)));
});

Deno.test("decodeStun() names the attributes that must be understood and are not", () => {
  const integrity = `0008 0014 ${pad(20)}`;
  const rows: [attributes: string, unknown: number[]][] = [
    ["7fff 0000", [0x7fff]],
    ["0002 0008 0001 1234 c0000209 001a 0000", [0x02, 0x1a]], // RESPONSE-ADDRESS would aim us at others
    ["8022 0000 ffff 0000", []],
    ["0006 0001 61000000 0024 0004 00000001 0025 0000", []], // what ICE says of itself
    [`${integrity} 7fff 0000`, []], // nobody vouches for it
  ];
  for (const [attributes, unknown] of rows) {
    const length = bytes(attributes).length.toString(16).padStart(4, "0");
    assertEquals(decodeStun(bytes(`0001 ${length} 2112a442 ${STUN_ID} ${attributes}`))?.unknown, unknown, attributes);
  }
});

Deno.test("decode() and its like never throw, and encode again what they decode, for 20,000 mutations", () => {
  const below = seeded(1);
  const sources = [...GOLDEN.map(({ data }) => data), ...PEERS.map(({ message }) => encodeInner(message as Peer))];
  sources.push(STUN_REQUEST, STUN_V4, STUN_V6, STUN_CLASSIC);
  let decoded = 0;
  for (let round = 0; round < 20_000; round++) {
    let data = Uint8Array.from({ length: below(100) }, () => below(256));
    if (round % 4 > 0) data = Uint8Array.from(sources[below(sources.length)]!);
    else if (round % 8 > 0 && data.length > 1) data.set([0x50, GOLDEN[below(GOLDEN.length)]!.data[1]!]);
    for (let edits = below(4); edits > 0 && data.length > 0; edits--) {
      const at = below(data.length), edit = below(6);
      if (edit < 2) data[at] = below(256);
      else if (edit < 4) data = flip(data, 8 * at + below(8));
      else data = Uint8Array.of(...data.subarray(0, at), ...data.subarray(edit === 4 ? at + 1 : below(data.length)));
    }
    assert(isCanonical(data), hex(data));
    assertEquals(openPeer(data, counting(32, 1)), null);
    explain(data);
    const stun = decodeStun(data);
    assert(!stun || data[0]! < 4 && encodeStunResponse(stun, { mapped: V4 }));
    if (decode(data) || decodeHandshake(data) || decodeInner(data)) decoded++;
  }
  assert(decoded > 5_000, `only ${decoded} were worth the test`);
});

// ---------------------------------------------------------------------------------------------------- sizes

Deno.test("encode() and encodeHandshake() fill 1,200 bytes, and throw a RangeError over that", () => {
  const rows: [fits: number, (body: Uint8Array) => Uint8Array][] = [
    [1161, (body) => encode({ type: "P2PTRANS", to: "bob", nonce: NONCE, call: 1, body }, SEAL)],
    [1162, (body) => encode({ type: "RELAYED", from: "bob", nonce: NONCE, body }, SEAL)],
    [1190, (noise) => encodeHandshake({ type: "P2PFIRST", from: 1, probe: 1, noise })],
    [1156, (sealed) => encodeHandshake({ type: "P2PSECOND", to: 1, from: 1, noise: KEY, sealed })],
  ];
  for (const [fits, encoded] of rows) {
    const full = encoded(new Uint8Array(fits));
    assertEquals(full.length, MAX_DATAGRAM_BYTES);
    assert(read(full) && !read(Uint8Array.of(...full, 0)));
    assertThrows(() => encoded(new Uint8Array(fits + 1)), RangeError);
  }
  const withLocal = (count: number) =>
    encode({ type: "KEEPALIVE", cookie: NONCE, rttMs: 0, nat: NAT, local: Array<string>(count).fill(V4) }, SEAL);
  assert(withLocal(8));
  for (const count of [9, 255]) assertThrows(() => withLocal(count), RangeError);
  const toName = (to: string, length = 0) =>
    decode(encode({ type: "P2PTRANS", to, nonce: NONCE, call: 0, body: new Uint8Array(length) }, SEAL));
  for (const name of ["a".repeat(255), "é".repeat(127), ""]) assert(toName(name));
  for (const name of ["a".repeat(256), "é".repeat(128)]) assertThrows(() => toName(name), RangeError);
  assert(toName("a".repeat(255), 909));
  assertThrows(() => toName("a".repeat(255), 910), RangeError);
});

Deno.test("decode() takes no name from a server that could not be one, since it is shown as it is", () => {
  const user = { nonce: NONCE, key: KEY, public: V4 };
  const listed = (name: string) =>
    decode(encode({ type: "USERS", asked: 1, page: 0, last: 0, more: 0, total: 1, users: [{ ...user, name }] }, SEAL));
  assert(listed("jos\u00e9"));
  for (const name of ["", "a b", "a\nb: hi", "\x1b[2J", "\u202eb", "jose\u0301", "x".repeat(33)]) {
    assert(!listed(name), name);
  }
});

Deno.test("jsonLine() is JSON with no control character in it", () => {
  const text = "\x00\x1b[2J\x7f\x9b31m\x9d\u2028\u2029\r\n é 👍";
  const line = jsonLine({ text });
  assert(!/[\p{Cc}\u2028\u2029]/u.test(line), line);
  assertEquals(JSON.parse(line), { text });
});

Deno.test("encode() makes nothing of a client smaller than MIN_CLIENT_BYTES, and COOKIE no larger", () => {
  for (const { message, data } of CONTROLS) {
    const fromServer = messageTable().find(({ name }) => name === message.type)!.way === "S -> C";
    assert(fromServer || data.length >= MIN_CLIENT_BYTES, message.type);
  }
  assert(goldenOf("COOKIE").length <= MIN_CLIENT_BYTES);
});

Deno.test("MAX_PART_BYTES fits into the first message of a handshake inside the largest introduction", () => {
  const inner = encodeInner({ type: "P2PMESSAGE", seq: 0, base: 0, left: 0, part: new Uint8Array(MAX_PART_BYTES) });
  const body = encodeHandshake({ type: "P2PFIRST", from: 0, probe: 0, noise: new Uint8Array(32 + inner.length + 16) });
  const candidates = [...Array<string>(MAX_CANDIDATES + 1).fill(V6), V4]; // its own, and both that the server sees
  const peer = { name: "n".repeat(MAX_NAME_BYTES), nonce: NONCE, key: KEY, candidates, nat: NAT, punchAfterMs: 0 };
  assert(encode({ type: "P2PSOMEONEWANTTOCALLYOU", peer, body }, SEAL).length <= MAX_DATAGRAM_BYTES);
});

// ---------------------------------------------------------------------------------------------------- endpoints

Deno.test("parseEndpoint() and formatEndpoint() undo each other", () => {
  const rows: [host: string, port: number, endpoint: string][] = [
    ["203.0.113.7", 1, "203.0.113.7:1"],
    ["0.0.0.0", 65535, "0.0.0.0:65535"],
    ["::", 2280, "[::]:2280"],
    ["2001:db8::1", 41000, "[2001:db8::1]:41000"],
    ["1:2:3:4:5:6:7:8", 9, "[1:2:3:4:5:6:7:8]:9"],
    ["::ffff:192.0.2.1", 9, "[::ffff:192.0.2.1]:9"],
  ];
  for (const [host, port, endpoint] of rows) {
    assertEquals(parseEndpoint(endpoint), { host, port });
    assertEquals(formatEndpoint(host, port), endpoint);
    assertEquals(hostOf(endpoint), host);
    assertEquals(isIPv6(endpoint), host.includes(":"));
  }
});

Deno.test("parseEndpoint() returns null for what is not an IP literal with a port", () => {
  const ports = ["", ":", ":0", ":65536", ":100000", ":-1", ":+1", ": 1", ":1 ", ":1.5", ":0x10", ":1e3", ":a"];
  const hosts = " localhost 1.2.3 1.2.3.4.5 256.0.0.1 01.2.3.4 1.2.3.04 1.2.3.-4 0x1.2.3.4 ::1 2001:db8::1 [::1 ::1]";
  const inside =
    " : ::: 1::2::3 1:2:3:4:5:6:7 1:2:3:4:5:6:7:8:9 1:2:3:4:5:6:7::8 12345:: g:: fe80::1%eth0 :1:2:3:4:5:6:7 " +
    "1:2:3:4:5:6:7: ::1.2.3 ::1.2.3.256 1.2.3.4:: 1.2.3.4 localhost [::1]";
  const rows = [
    ...ports.flatMap((port) => [`1.2.3.4${port}`, `[::1]${port}`]),
    ...hosts.split(" ").map((host) => `${host}:80`),
    ...inside.split(" ").map((host) => `[${host}]:80`),
  ];
  for (const row of rows) assertEquals(parseEndpoint(row), null, row);
});

Deno.test("formatAddress() writes IPv6 as RFC 5952 has it, and addressBytes() reads it", () => {
  const rows: [text: string, ...others: string[]][] = [
    ["::", "0:0:0:0:0:0:0:0", "0::0"],
    ["::1", "0:0:0:0:0:0:0:1", "0000::0001"],
    ["1::", "1:0:0:0:0:0:0:0"],
    ["2001:db8::1", "2001:DB8:0:0::1", "2001:0db8::0001"],
    ["2001:db8:0:1:1:1:1:1", "2001:db8::1:1:1:1:1"], // 4.2.2: not for one group
    ["2001:0:0:1::1", "2001:0:0:1:0:0:0:1"], // 4.2.3: the longest
    ["2001:db8::1:0:0:1", "2001:db8:0:0:1:0:0:1"], // 4.2.3: the first of equals
    ["1:2:3:4:5:6::", "1:2:3:4:5:6:0:0"],
    ["10:0:20::30", "10:0:20:0:0:0:0:30"],
    ["1:2:3:4:5:6:7:0", "1:2:3:4:5:6:7::"],
    ["64:ff9b::c000:201", "64:ff9b::192.0.2.1"],
    ["203.0.113.7", "::ffff:203.0.113.7", "::ffff:cb00:7107", "0:0:0:0:0:FFFF:203.0.113.7"],
  ];
  for (const [text, ...others] of rows) {
    for (const other of [text, ...others]) assertEquals(formatAddress(addressBytes(other)!), text, other);
  }
  const below = seeded(2);
  for (let round = 0; round < 2_000; round++) {
    const address = Uint8Array.from({ length: 16 }, (_, i) => i % 2 === 0 || below(2) === 0 ? 0 : below(256));
    assertEquals(addressBytes(formatAddress(address)), address);
  }
});

Deno.test("scopeOf() tells where an address can be reached from", () => {
  const rows = [
    "loopback 127.0.0.1 127.255.255.255 ::1 ::ffff:127.0.0.1",
    "private 10.0.0.0 172.16.0.0 172.31.255.255 192.168.0.1 100.64.0.0 100.127.255.255 fc00:: fdff::1 ::ffff:10.0.0.1",
    "link 169.254.0.1 fe80::1 febf::1",
    "public 1.1.1.1 9.255.255.255 11.0.0.0 172.15.255.255 172.32.0.0 192.167.255.255 192.169.0.0 169.253.0.1",
    "public 100.63.255.255 100.128.0.0 223.255.255.255 2000:: 3fff::1 2001:db8::1 ::ffff:1.1.1.1",
    "none 0.0.0.0 0.1.2.3 224.0.0.1 255.255.255.255 :: ::2 1fff:: 4000:: fe00:: fec0:: ff02::1 localhost 1.2.3 1::2::3",
  ].map((row) => row.split(" "));
  for (const [scope, ...hosts] of rows) for (const host of hosts) assertEquals<string>(scopeOf(host), scope!, host);
});

// ---------------------------------------------------------------------------------------------------- primitives

Deno.test("sipHash() matches the vectors of its authors", () => {
  const first = "310e0edd47db6f72 fd67dc93c539f874 5a4fa9d909806c0d 2d7efbd796666785 " +
    "b7877127e09427cf 8da699cd64557618 cee3fe586e46c9cb 37d1018bf50002ab";
  for (const [length, mac] of first.split(" ").entries()) {
    assertEquals(hex(sipHash(counting(16), counting(length))), mac);
  }
  assertEquals(hex(sipHash(counting(16), counting(15))), "e545be4961ca29a1");
});

Deno.test("accept() accepts each counter once, in order or up to 2,047 behind the highest", () => {
  const rows: [what: string, ...steps: [counter: number, fresh: boolean][]][] = [
    ["in order", [0, true], [1, true], [2, true]],
    ["duplicates", [0, true], [0, false], [5, true], [5, false], [0, false], [1, true], [1, false]],
    ["reordered", [2047, true], [0, true], [0, false], [2046, true], [2047, false]],
    ["too old", [2048, true], [0, false], [1, true], [4096, true], [2048, false], [2049, true]],
    ["a jump by one window", [7, true], [2055, true], [8, true], [7, false]],
    ["a large jump", [1, true], [2 ** 40, true], [2 ** 40 - 2047, true], [2 ** 40 - 2048, false], [1, false]],
    ["up to 48 bits", [2 ** 48 - 2, true], [2 ** 48 - 1, true], [2 ** 48 - 2, false], [2 ** 48 - 2048, true]],
    ["across 32 bits", [2 ** 32 - 1, true], [2 ** 32, true], [2 ** 32 - 1, false], [2 ** 32, false]],
  ];
  for (const [what, ...steps] of rows) {
    const window = replayWindow();
    for (const [counter, fresh] of steps) assertEquals(accept(window, counter), fresh, `${what}: ${counter}`);
  }
});

Deno.test("accept() agrees with a set that forgets nothing", () => {
  for (const [seed, jump] of [[3, 2], [4, 70], [5, 5_000]] as const) {
    const below = seeded(seed), window = replayWindow(), seen = new Set<number>();
    let highest = -1;
    for (let round = 0; round < 30_000; round++) {
      const counter = Math.max(0, below(3) === 0 ? highest + below(jump) : highest - below(2_200));
      const fresh = !seen.has(counter) && counter > highest - 2_048;
      assertEquals(accept(window, counter), fresh, `seed ${seed}, round ${round}: ${counter}`);
      seen.add(counter);
      highest = Math.max(highest, counter);
    }
  }
});

Deno.test("conform() allows a burst, then what comes back with time, and nothing for a clock that goes back", () => {
  const rate = { perSecond: 10, burst: 3 };
  const rows: [now: number, cost: number, allowed: boolean][] = [
    [1_000, 1, true],
    [1_000, 2, true],
    [1_000, 1, false],
    [1_050, 1, false],
    [1_100, 1, true], // two halves make one: what is refused costs nothing
    [1_100, 1, false],
    [400, 1, false],
    [1_100, 1, false],
    [1_200, 1, true],
    [90_000, 4, false], // never more than the burst
    [90_000, 3, true],
    [90_000, 0, true],
    [90_000, 1, false],
  ];
  let tat = 0;
  for (const [now, cost, allowed] of rows) {
    const next = conform(tat, rate, now, cost);
    assertEquals(next !== null, allowed, `${cost} at ${now}`);
    tat = next ?? tat;
  }
});

Deno.test("createLimit() agrees with an exact token bucket, today and in 200 years", () => {
  const below = seeded(6);
  for (const began of [0, 1.7e12, 8e12]) {
    for (const [perSecond, burst] of [[1, 1], [2, 7], [5, 20], [4, 300]] as const) {
      const limit = createLimit({ perSecond, burst });
      let now = began, thousandths = 1_000 * burst, allowed = 0; // of a token: integers, hence exact
      for (let round = 0; round < 5_000; round++) {
        const waited = below((below(500) === 0 ? 1_000 * burst : 1_000) / perSecond);
        const cost = below(4) === 0 ? below(5) : 1;
        now += waited;
        thousandths = Math.min(1_000 * burst, thousandths + perSecond * waited);
        const isEnough = thousandths >= 1_000 * cost;
        assertEquals(limit(now, cost), isEnough, `${perSecond} a second, ${burst} at once, round ${round}`);
        if (isEnough) thousandths -= 1_000 * cost, allowed++;
      }
      assert(allowed > 1_000 && allowed < 5_000, `${allowed} of 5,000 were allowed`);
    }
  }
});

Deno.test("createLimit() allows the whole burst at once and no more, however its times are rounded", () => {
  for (const [perSecond, burst] of [[0.3, 6], [3, 20], [7, 20], [30, 300], [49, 2_000], [2_000, 5_000]] as const) {
    for (const now of [0, 1.7e12 + 0.1, 1.7e12 + 0.7]) {
      const limit = createLimit({ perSecond, burst });
      const allowed = Array.from({ length: 2 * burst }, () => limit(now)).filter(Boolean).length;
      assertEquals(allowed, burst, `${perSecond} a second, ${burst} at once, at ${now}`);
    }
  }
});

Deno.test("userName() leaves NFC of 1 to 32 bytes without blanks, controls and what nobody sees", () => {
  const rows: [name: string, left: string | null][] = [
    ["bob", "bob"],
    ["zoe\u0308", "zo\u00eb"],
    ["李雷", "李雷"],
    ["🦊", "🦊"],
    ["a".repeat(32), "a".repeat(32)],
    ["a".repeat(33), null],
    ["é".repeat(16), "é".repeat(16)],
    ["e\u0301".repeat(16), "é".repeat(16)], // 48 bytes before, 32 after
    ["é".repeat(16) + "a", null],
    ["", null],
    ...[..." \t\n\r\0\x1b\x7f\u0085\u00a0\u2003\u2028\u3000\ufeff\u200b\u200d\u200e\u202e\u2066\u00ad\u{e0041}\ud800"]
      .flatMap((odd): [string, null][] => [[odd, null], [`b${odd}b`, null], [`bob${odd}`, null]]),
  ];
  for (const [name, left] of rows) assertEquals(userName(name), left, JSON.stringify(name));
});

Deno.test("safetyCode() is 40 digits in groups of 5, the same on both sides and another for another key", () => {
  const one = counting(32), other = counting(32, 1);
  const code = safetyCode(one, other);
  assert(/^\d{5}( \d{5}){7}$/.test(code), code);
  assertEquals(safetyCode(other, one), code);
  for (let at = 0; at < 32; at++) assertNotEquals(safetyCode(one, flip(other, 8 * at)), code);
});

// ---------------------------------------------------------------------------------------------------- Noise

// The vector of Noise_KKpsk0_25519_AESGCM_SHA256 that the snow project publishes (from cacophony).
const ALICE = keysFrom(bytes("e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1"));
const BOB = keysFrom(bytes("4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893"));
const ALICE_PUBLIC = "6bc3822a2aa7f4e6981d6538692b3cdf3e6df9eea6ed269eb41d93c22757b75a";
const BOB_PUBLIC = "31e0303fd6418d2f8c0e78b91f22e8caed0fbe48656dcf4767e4834f701b8f62";
const BOTH = { psk: utf8("This is my Austrian perspective!"), prologue: utf8("John Galt") };
const ALICE_E = keysFrom(bytes("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a"));
const BOB_E = keysFrom(bytes("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b"));
const BY_ALICE: NoiseOptions = { ...BOTH, own: ALICE, peer: BOB.public, ephemeral: ALICE_E };
const BY_BOB: NoiseOptions = { ...BOTH, own: BOB, peer: ALICE.public, ephemeral: BOB_E };
const HANDSHAKE_HASH = "574508da75f9e5a1c25707190adc49e63c754ec27a4183d9e6acc312e076613a";
type Pair = [payload: Uint8Array, ciphertext: Uint8Array];
/** Payload and ciphertext of each message; alice sends the first, third and fifth. */
const MESSAGES = `
  4c756477696720766f6e204d69736573 ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c79441f33bde990995eea7167375d6b68e2a7fa07887dd4f0f21023317d7b04fb0a67
  4d757272617920526f746862617264 95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843e3502578269a63176a4e59632b20df3393996180e261048266e49c0c0d9240
  462e20412e20486179656b a08f4d4f142f605e9b30daa66784552576b30265889139b97f15cf
  4361726c204d656e676572 5871e43af881754e8ba7def42a69c23bfc9f7d47c3c1009f8ed986
  4a65616e2d426170746973746520536179 9e20a696864cb0e321197abcd721538c2155073c14313c3fa243a65fef13eb0e79
  457567656e2042f6686d20766f6e2042617765726b c4fa90a3f3e7524bdf5dce131ad0b67a0fa1eedd30f717a42596bef8f53d369b5dc94ce508
`.trim().split("\n").map((line) => line.trim().split(" ").map(bytes) as Pair);
const [[PAYLOAD, FIRST], [ANSWER, SECOND], ...LATER] = MESSAGES as [Pair, Pair, ...Pair[]];

/** Every encoding of a point whose order divides 8; X25519 ignores the highest bit. */
const LOW_ORDER = `
  0000000000000000000000000000000000000000000000000000000000000000
  0100000000000000000000000000000000000000000000000000000000000000
  e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800
  5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157
  ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f
  edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f
  eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f
`.trim().split("\n").flatMap((line) => [bytes(line), flip(bytes(line), 255)]);

Deno.test("initiate() and respond() match the published vector, and so do the keys that they make", () => {
  assertEquals([hex(ALICE.public), hex(BOB.public)], [ALICE_PUBLIC, BOB_PUBLIC]);
  const initiation = initiate(BY_ALICE, PAYLOAD)!;
  assertEquals(hex(initiation.message), hex(FIRST));
  const first = Uint8Array.from(FIRST), response = respond(BY_BOB, first)!;
  first.fill(0xdd); // as a buffer that is used again
  assertEquals(response.payload, PAYLOAD);
  const { message, keys: bob } = response.answer(ANSWER);
  assertEquals(hex(message), hex(SECOND));
  const { payload, keys: alice } = initiation.finish(SECOND)!;
  assertEquals(payload, ANSWER);

  assertEquals([hex(alice.hash), hex(bob.hash)], [HANDSHAKE_HASH, HANDSHAKE_HASH]);
  assertEquals([alice.send, alice.receive], [bob.receive, bob.send]);
  for (const [i, [text, sealed]] of LATER.entries()) { // by turns, and each counts his own
    const sender = i % 2 === 0 ? alice : bob, nonce = bytes(`00000000 000000000000000${i >> 1}`);
    assertEquals(hex(aesGcm(sender.send, { nonce, ad: new Uint8Array(0), text })), hex(sealed));
  }
});

Deno.test("respond() and finish() return null unless both know the same", () => {
  const stranger = generateKeys();
  const rows: Record<string, Partial<NoiseOptions>> = {
    psk: { psk: new Uint8Array(32) },
    prologue: { prologue: utf8("John Gall") },
    peer: { peer: stranger.public },
    own: { own: stranger },
  };
  for (const [what, other] of Object.entries(rows)) {
    assertEquals(respond({ ...BY_BOB, ...other }, FIRST), null, what);
    assertEquals(initiate({ ...BY_ALICE, ...other }, PAYLOAD)!.finish(SECOND), null, what);
  }
  assertEquals(initiate({ ...BY_ALICE, ephemeral: stranger }, PAYLOAD)!.finish(SECOND), null);
});

Deno.test("respond() and finish() return null for a flipped bit or a cut, and finish() still takes the genuine one", () => {
  const { finish } = initiate(BY_ALICE, PAYLOAD)!;
  for (let bit = 0; bit < 8 * FIRST.length; bit++) assertEquals(respond(BY_BOB, flip(FIRST, bit)), null, `bit ${bit}`);
  for (let bit = 0; bit < 8 * SECOND.length; bit++) assertEquals(finish(flip(SECOND, bit)), null, `bit ${bit}`);
  for (let length = 0; length < FIRST.length; length++) assertEquals(respond(BY_BOB, FIRST.slice(0, length)), null);
  for (let length = 0; length < SECOND.length; length++) assertEquals(finish(SECOND.slice(0, length)), null);
  assertEquals(respond(BY_BOB, Uint8Array.of(...FIRST, 0)), null);
  for (let again = 0; again < 2; again++) assertEquals(hex(finish(SECOND)!.keys.hash), HANDSHAKE_HASH);
});

Deno.test("diffieHellman(), initiate(), respond() and finish() return null for a point of low order", () => {
  const { finish } = initiate(BY_ALICE, PAYLOAD)!;
  for (const point of LOW_ORDER) {
    assertEquals(diffieHellman(ALICE.secret, point), null, hex(point));
    assertEquals(initiate({ ...BY_ALICE, peer: point }, PAYLOAD), null);
    assertEquals(respond({ ...BY_BOB, peer: point }, FIRST), null);
    assertEquals(respond(BY_BOB, Uint8Array.of(...point, ...FIRST.subarray(32))), null);
    assertEquals(finish(Uint8Array.of(...point, ...SECOND.subarray(32))), null);
    assertEquals(respond({ ...BY_BOB, peer: point }, forgery(point)), null);
  }
  for (const length of [0, 31, 33]) assertEquals(diffieHellman(ALICE.secret, new Uint8Array(length).fill(9)), null);
  assertEquals(diffieHellman(ALICE.secret, BOB.public), diffieHellman(BOB.secret, ALICE.public));
});

/** What opens for a responder who does not give up at a point of low order, but goes on with the key that he has. */
function forgery(point: Uint8Array): Uint8Array {
  const name = utf8("Noise_KKpsk0_25519_AESGCM_SHA256");
  const mixed = deriveKey(BOTH.psk, { salt: name, info: "", length: 96 });
  const ad = [BOTH.prologue, point, BOB.public, mixed.slice(32, 64), point].reduce(
    (hash, part) => Uint8Array.from(createHash("sha256").update(hash).update(part).digest()),
    name,
  );
  const key = deriveKey(point, { salt: mixed.slice(0, 32), info: "", length: 64 }).slice(32);
  return Uint8Array.of(...point, ...aesGcm(key, { nonce: new Uint8Array(12), ad, text: PAYLOAD }));
}

// ---------------------------------------------------------------------------------------------------- real sockets

/** Waits until it is so, 5 s at most. */
async function until(isSo: () => boolean, what: string): Promise<void> {
  for (const end = clock() + 5_000; !isSo();) {
    assert(clock() < end, `5 s without: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** What Deno 2.9 does not look for unless told to. */
const NO_LEAKS = { sanitizeOps: true, sanitizeResources: true };
const LOOPBACK = { host: "127.0.0.1", port: 0 };

Deno.test("listen() carries a conversation, from the login to a path over the LAN", NO_LEAKS, async () => {
  const server = await listen(createServer({ keys: generateKeys(), random }), { sockets: [LOOPBACK], onEvent() {} });
  const servers = [formatEndpoint(LOOPBACK.host, server.ports[0]!)];
  const started: { close(): void }[] = [server];
  const join = async (name: string) => {
    const events: ClientEvent[] = [];
    const client = createClient({ name, keys: generateKeys(), servers, random, generateKeys });
    const running = await listen(client, { sockets: [LOOPBACK], onEvent: (event) => events.push(event) });
    started.push(running);
    const saw = (sought: Partial<ClientEvent>) =>
      until(
        () => events.some((event) => Object.entries(sought).every(([k, v]) => event[k as keyof ClientEvent] === v)),
        `${name} sees ${JSON.stringify(sought)}`,
      );
    await saw({ event: "login", name, server: servers[0]! });
    return { saw, perform: (command: Command) => running.perform(client.command(command, clock())) };
  };
  try {
    const [alice, bob] = [await join("alice"), await join("bob")];
    alice.perform({ command: "send", to: "bob", text: "hi" });
    await bob.saw({ event: "message", from: "alice", text: "hi" });
    await alice.saw({ event: "sent", to: "bob", ok: true });
    await alice.saw({ event: "path", peer: "bob", path: "lan" });
    await bob.saw({ event: "path", peer: "alice", path: "lan" });
    alice.perform({ command: "send", to: "bob", text: "directly" });
    await bob.saw({ event: "message", text: "directly", path: "lan" });
    await alice.saw({ event: "sent", ok: true, path: "lan" });
  } finally {
    for (const running of started) running.close();
  }
});

/** Does nothing but count bytes. */
const scale = (weights: number[] = []): Machine => ({
  opened: () => [],
  receive: ({ data }) => weights.push(data.length) > 0 ? [] : [],
  wake: () => [],
  wakeAt: () => Infinity,
});

Deno.test(
  "listen() goes on after empty and too long datagrams, ICMP errors and failures to send",
  NO_LEAKS,
  async () => {
    const received: number[] = [];
    const gone = await listen(scale(), { sockets: [LOOPBACK], onEvent() {} });
    gone.close();
    const running = await listen(scale(received), { sockets: [LOOPBACK], onEvent() {} });
    const sender = await listen(scale(), { sockets: [LOOPBACK], onEvent() {} });
    const send = (from: Running<unknown>, to: string, length: number) =>
      from.perform([{ kind: "send", socket: 0, to, data: new Uint8Array(length) }]);
    try {
      for (const [bad, good] of [[2049, 1], [9000, 1199], [0, 2048]] as const) {
        for (const to of [formatEndpoint(LOOPBACK.host, gone.ports[0]!), V6, "nonsense"]) send(running, to, 9);
        for (const length of [bad, good]) send(sender, formatEndpoint(LOOPBACK.host, running.ports[0]!), length);
        await until(() => received.includes(good), `${good} bytes`);
      }
      assertEquals(received.filter((length) => length > 0), [1, 1199, 2048]);
    } finally {
      sender.close();
      running.close();
    }
  },
);

Deno.test("listen() throws no failure of its machine at whoever performs effects", NO_LEAKS, async () => {
  let fails = false;
  const machine: Machine = {
    ...{ opened: () => [], receive: () => [], wake: () => [] },
    wakeAt() {
      if (fails) throw new TypeError("shown once in this test");
      return Infinity;
    },
  };
  const running = await listen(machine, { sockets: [LOOPBACK], onEvent() {} });
  fails = true;
  running.perform([]);
  fails = false;
  running.perform([]);
  running.close();
  await new Promise((written) => setTimeout(written, 20));
});

Deno.test("listen() rejects for a port in use, and closes what it has bound before", NO_LEAKS, async () => {
  const running = await listen(scale(), { sockets: [LOOPBACK], onEvent() {} });
  const port = running.ports[0]!;
  try {
    const taken = { sockets: [LOOPBACK, { ...LOOPBACK, port }], onEvent() {} };
    const error = await assertRejects(() => listen(scale(), taken)) as Error & { code?: string };
    assertEquals(error.code, "EADDRINUSE");
    const again = () => listen(scale(), taken);
    const failure = await assertRejects(() => listenOrFail(again, { json: false }), Failure);
    assertEquals(failure.message, `Cannot bind UDP port "${port}": address already in use, choose another with --port`);
  } finally {
    running.close();
  }
});

Deno.test("messageTable() is the table of README.md", async () => {
  const readme = await Deno.readTextFile(new URL("README.md", import.meta.url));
  const words = (line: string) => line.split("|").map((cell) => cell.trim()).join(" | ");
  const lines = readme.split("\n").map(words);
  for (const { code, name, way, what, fields } of messageTable()) {
    const row = words(`| ${code} | ${name} | ${way} | ${what} | ${fields.join(", ")} |`);
    assert(lines.includes(row), row);
  }
});
