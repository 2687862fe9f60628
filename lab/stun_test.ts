/**
 * STUN: the published vectors, our own bytes, what strangers may do to them, where the server answers from and how
 * often. Debian's STUN clients ask the real server in slow/stun_test.ts.
 *
 * @module
 */
import assert from "node:assert/strict";
import { createHash, createHmac } from "node:crypto";
import { test } from "node:test";
import { crc32 } from "node:zlib";
import {
  concat,
  controlKeys,
  decode,
  decodeStun,
  diffieHellman,
  type Effect,
  encode,
  encodeStunRequest,
  encodeStunResponse,
  type Endpoint,
  explain,
  formatEndpoint,
  hex,
  hostOf,
  keysFrom,
  loginKey,
  type Machine,
  MAX_DATAGRAM_BYTES,
  type Stun,
  STUN_CHANGE_REQUEST,
  STUN_COOKIE,
  verifies,
} from "../protocol.ts";
import { VERSION } from "../protocol.ts";
import { createServer, type Server, type ServerEvent, type ServerOptions } from "../server.ts";
import { dice, enter, hand } from "./hostile.ts";
import { createNetwork, NATS, random } from "./network.ts";

const bytes = (digits: string) => Uint8Array.from(digits.replace(/\s/g, "").match(/../g) ?? [], (d) => parseInt(d, 16));
const utf8 = (text: string) => new TextEncoder().encode(text);
const two = (value: number) => value.toString(16).padStart(4, "0");

const ID = "0102030405060708090a0b0c", TRANSACTION = STUN_COOKIE + ID;
const CLASSIC = "000102030405060708090a0b0c0d0e0f";
const PLAIN: Stun = {
  kind: "request",
  transaction: TRANSACTION,
  changeIp: false,
  changePort: false,
  unknown: [],
  classic: false,
};

/** A Binding request with these attributes, for what `encodeStunRequest` would not say. */
function request(attributes: string, transaction = TRANSACTION): Uint8Array {
  const body = bytes(attributes);
  return concat(bytes(`0001 ${two(body.length)} ${transaction}`), body);
}

/** Puts a FINGERPRINT behind a message. */
function fingerprinted(message: Uint8Array): Uint8Array {
  const longer = concat(message.subarray(0, 2), bytes(two(message.length - 20 + 8)), message.subarray(4));
  const sum = (crc32(longer) ^ 0x5354554e) >>> 0;
  return concat(longer, bytes(`8028 0004 ${sum.toString(16).padStart(8, "0")}`));
}

// ---------------------------------------------------------------------------------------------------- RFC 5769

const SHORT_TERM = utf8("VOkJxbRl1RmTxUk/WvJxBt");
const LONG_TERM = createHash("md5").update("マトリックス:example.org:TheMatrIX").digest();

/** The sample messages of sections 2.1 to 2.4. */
const VECTORS: { name: string; key: Uint8Array; data: Uint8Array; says: Partial<Stun> }[] = [
  {
    name: "2.1 request",
    key: SHORT_TERM,
    data: bytes(`00010058 2112a442 b7e7a701bc34d686fa87dfae
      80220010 5354554e207465737420636c69656e74 00240004 6e0001ff 80290008 932ff9b151263b36
      00060009 6576746a3a68367659202020 00080014 9aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2 80280004 e57a3bcf`),
    says: { kind: "request" },
  },
  {
    name: "2.2 IPv4 response",
    key: SHORT_TERM,
    data: bytes(`0101003c 2112a442 b7e7a701bc34d686fa87dfae 8022000b 7465737420766563746f7220
      00200008 0001a147e112a643 00080014 2b91f599fd9e90c38c7489f92af9ba53f06be7d7 80280004 c07d4c96`),
    says: { kind: "response", mapped: "192.0.2.1:32853" },
  },
  {
    name: "2.3 IPv6 response",
    key: SHORT_TERM,
    data: bytes(`01010048 2112a442 b7e7a701bc34d686fa87dfae 8022000b 7465737420766563746f7220
      00200014 0002a1470113a9faa5d3f179bc25f4b5bed2b9d9
      00080014 a382954e4be67bf11784c97c8292c275bfe3ed41 80280004 c8fb0b4c`),
    says: { kind: "response", mapped: "[2001:db8:1234:5678:11:2233:4455:6677]:32853" },
  },
  {
    name: "2.4 request with long-term authentication",
    key: LONG_TERM,
    data: bytes(`00010060 2112a442 78ad3433c6ad72c029da412e
      00060012 e3839ee38388e383aae38383e382afe382b90000
      0015001c 662f2f3439396b39353464364f4c33346f4c39465354767936347341
      0014000b 6578616d706c652e6f726700 00080014 f67024656dd64a3e02b8e0712e85c9a28ca89666`),
    says: { kind: "request" },
  },
];

for (const { name, key, data, says } of VECTORS) {
  test(`decodeStun() reads the vector ${name} of RFC 5769`, () => {
    const at = hex(data).indexOf("00080014") / 2; // that the hex is the RFC's: its MAC is right
    const covered = concat(data.subarray(0, 2), bytes(two(at + 24 - 20)), data.subarray(4, at));
    assert.equal(createHmac("sha1", key).update(covered).digest("hex"), hex(data.subarray(at + 4, at + 24)));

    assert.deepEqual(decodeStun(data), { ...PLAIN, transaction: hex(data.subarray(4, 20)), ...says });
    if (name.startsWith("2.4")) return; // it has no FINGERPRINT
    const values = [[0, 20], [at + 4, at + 24], [data.length - 4, data.length]] as const;
    for (const [from, to] of values) {
      for (let bit = 8 * from; bit < 8 * to; bit++) {
        const flipped = data.map((byte, i) => i === bit >> 3 ? byte ^ 1 << bit % 8 : byte);
        assert.equal(decodeStun(flipped), null, `bit ${bit} is not covered by the FINGERPRINT`);
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------- golden bytes

const HEAD = `${STUN_COOKIE} ${ID}`;
const V4 = "203.0.113.7:41000", V6 = "[2001:db8::1]:443";
const V4_XOR = "0001 813a ea12d545", V6_XOR = "0002 20a9 0113a9fa 01020304 05060708 090a0b0d";

/** Bytes, what they say, and who writes them. */
const GOLDEN: { data: string; says: Stun; made: Uint8Array }[] = [
  { data: `0001 0000 ${HEAD}`, says: PLAIN, made: encodeStunRequest({ transaction: TRANSACTION }) },
  ...([[true, false, 4], [false, true, 2], [true, true, 6]] as const).map(([changeIp, changePort, flags]) => ({
    data: `0001 0008 ${HEAD} 0003 0004 0000000${flags}`,
    says: { ...PLAIN, changeIp, changePort },
    made: encodeStunRequest({ transaction: TRANSACTION, changeIp, changePort }),
  })),
  {
    data: `0001 0008 ${CLASSIC} 0003 0004 00000006`,
    says: { ...PLAIN, transaction: CLASSIC, classic: true, changeIp: true, changePort: true },
    made: encodeStunRequest({ transaction: CLASSIC, changeIp: true, changePort: true }),
  },
  {
    data: `0101 000c ${HEAD} 0020 0008 ${V4_XOR}`,
    says: { ...PLAIN, kind: "response", mapped: V4 },
    made: encodeStunResponse(PLAIN, { mapped: V4 }),
  },
  {
    data: `0101 0018 ${HEAD} 0020 0014 ${V6_XOR}`,
    says: { ...PLAIN, kind: "response", mapped: V6 },
    made: encodeStunResponse(PLAIN, { mapped: V6 }),
  },
  {
    data: `0101 0024 ${HEAD} 0020 0008 ${V4_XOR} 802b 0008 0001 08e8 c0000201 802c 0008 0001 08e9 c0000202`,
    says: { ...PLAIN, kind: "response", mapped: V4, origin: "192.0.2.1:2280", other: "192.0.2.2:2281" },
    made: encodeStunResponse(PLAIN, { mapped: V4, origin: "192.0.2.1:2280", other: "192.0.2.2:2281" }),
  },
  {
    data: `0101 0024 ${CLASSIC} 0001 0008 0001 a028 cb007107 0004 0008 0001 08e8 c0000201 0005 0008 0001 08e9 c0000202`,
    says: {
      ...PLAIN,
      kind: "response",
      transaction: CLASSIC,
      classic: true,
      mapped: V4,
      origin: "192.0.2.1:2280",
      other: "192.0.2.2:2281",
    },
    made: encodeStunResponse({ ...PLAIN, transaction: CLASSIC, classic: true }, {
      mapped: V4,
      origin: "192.0.2.1:2280",
      other: "192.0.2.2:2281",
    }),
  },
  {
    data: `0111 0010 ${HEAD} 0009 0004 00000414 000a 0002 0027 0000`,
    says: { ...PLAIN, kind: "error" },
    made: encodeStunResponse({ ...PLAIN, unknown: [0x27] }, { mapped: V4 }),
  },
  {
    data: `0111 0010 ${CLASSIC} 0009 0004 00000414 000a 0004 0027 0027`,
    says: { ...PLAIN, kind: "error", transaction: CLASSIC, classic: true },
    made: encodeStunResponse({ ...PLAIN, transaction: CLASSIC, classic: true, unknown: [0x27] }, { mapped: V4 }),
  },
];

test("encodeStunRequest(), encodeStunResponse() and decodeStun() make and read the same bytes", () => {
  for (const { data, says, made } of GOLDEN) {
    assert.equal(hex(made), data.replace(/\s/g, ""));
    assert.deepEqual(decodeStun(made), says);
    assert.deepEqual(decodeStun(fingerprinted(made)), says);
    assert.match(explain(made), /^STUN Binding /);
  }
});

test("decodeStun() takes XOR-MAPPED-ADDRESS before MAPPED-ADDRESS, in whatever order they come", () => {
  const plain = "0001 0008 0001 0001 0a000001", xored = `0020 0008 ${V4_XOR}`;
  for (const body of [plain + xored, xored + plain]) {
    assert.equal(decodeStun(bytes(`0101 0018 ${HEAD} ${body}`))?.mapped, V4);
  }
  assert.equal(decodeStun(bytes(`0101 000c ${HEAD} ${plain}`))?.mapped, "10.0.0.1:1");
});

test("decodeStun() names what must be understood and is not, and passes over what may be ignored", () => {
  const passedOver = [
    "0006 0003 61626300",
    "0008 0014" + "00".repeat(20),
    "0014 0000",
    "0015 0000",
    "0024 0004 6e0001ff",
  ];
  passedOver.push("0025 0000", "8022 0001 61000000", "8029 0008 0102030405060708", "802a 0008 0102030405060708");
  for (const attribute of passedOver) assert.deepEqual(decodeStun(request(attribute)), PLAIN, attribute);
  // RESPONSE-ADDRESS (RFC 3489) would aim us at others; XOR-PEER-ADDRESS.
  const refused = [
    "0002 0008 0001 0050 c0000209",
    "0012 0000",
    "7fff 0000",
  ];
  for (const attribute of refused) {
    assert.deepEqual(decodeStun(request(attribute)), { ...PLAIN, unknown: [parseInt(attribute.slice(0, 4), 16)] });
  }
  const behind = request("0008 0014" + "00".repeat(20) + "0003 0004 00000006" + "0027 0004 00500000");
  assert.deepEqual(decodeStun(behind), PLAIN, "nothing behind MESSAGE-INTEGRITY counts");
});

test("decodeStun() returns null for everything that is not a Binding message to the last byte", () => {
  const wrong: [string, string][] = [
    ["nothing", ""],
    ["a header that is cut", `0001 0000 ${STUN_COOKIE} 0102`],
    ["another method: Allocate of TURN", `0003 0000 ${HEAD}`],
    ["the two highest bits", `4001 0000 ${HEAD}`],
    ["a length that is too small", `0001 0000 ${HEAD} 0003 0004 00000006`],
    ["a length that is too large", `0001 0010 ${HEAD} 0003 0004 00000006`],
    ["a length that is no multiple of 4", `0001 0006 ${HEAD} 8022 0002 6161`],
    ["an attribute that is longer than the message", `0001 0008 ${HEAD} 8022 0005 61616161`],
    ["CHANGE-REQUEST of 2 bytes", `0001 0008 ${HEAD} 0003 0002 00060000`],
    ["CHANGE-REQUEST of 8 bytes", `0001 000c ${HEAD} 0003 0008 00000006 00000000`],
    ["an address of no family", `0101 000c ${HEAD} 0020 0008 0000 813a ea12d545`],
    ["an address of a third family", `0101 000c ${HEAD} 0020 0008 0003 813a ea12d545`],
    ["an IPv4 address of 16 bytes", `0101 0018 ${HEAD} 0020 0014 0001 20a9 0113a9fa 01020304 05060708 090a0b0d`],
    ["an IPv6 address of 4 bytes", `0101 000c ${HEAD} 0020 0008 0002 813a ea12d545`],
    ["an address without port", `0101 000c ${HEAD} 0001 0008 0001 0000 cb007107`],
    ["an address of no bytes", `0101 0004 ${HEAD} 0001 0000`],
    ["a FINGERPRINT that is wrong", `0001 0008 ${HEAD} 8028 0004 00000000`],
    ["a FINGERPRINT of 2 bytes", `0001 0008 ${HEAD} 8028 0002 00000000`],
    ["something behind the FINGERPRINT", hex(fingerprinted(request(""))).replace("00010008", "0001000c") + "80220000"],
  ];
  for (const [what, data] of wrong) assert.equal(decodeStun(bytes(data)), null, what);
});

// ---------------------------------------------------------------------------------------------------- the server

const HOSTS: [string, string] = ["192.0.2.1", "192.0.2.2"];
const T0 = 1_700_000_000_000;
type Send = Extract<Effect<ServerEvent>, { kind: "send" }>;

function makeServer(options: Partial<ServerOptions> = {}): Server {
  const next = random("stun");
  const bytes = (length: number) => Uint8Array.from({ length }, () => Math.floor(next() * 256));
  return createServer({ keys: keysFrom(bytes(32)), random: bytes, ...options });
}

/** A server whose sockets are bound: three of them, or with `hosts` five. */
function openServer(options: Partial<ServerOptions> = {}): Server {
  const server = makeServer(options);
  const ports = [2280, 2281, 50_000, ...options.hosts ? [2280, 2281] : []];
  for (const [socket, port] of ports.entries()) server.opened(socket, port, T0);
  return server;
}

const ask = (server: Server, data: Uint8Array, { from = V4, socket = 0, now = T0 } = {}): Send[] =>
  server.receive({ socket, from, data }, now).filter((effect) => effect.kind === "send");

/** How many of so many plain requests are answered. */
function answered(server: Server, count: number, options: { from: (i: number) => Endpoint; now?: number }): number {
  const data = encodeStunRequest({ transaction: TRANSACTION });
  let answers = 0;
  for (let i = 0; i < count; i++) {
    answers += ask(server, data, { from: options.from(i), now: options.now ?? T0 }).length;
  }
  return answers;
}

test("20,000 mutations of STUN messages: no exception, at most one answer, to the asker's address, and no louder than allowed", () => {
  const next = random("mutations"), below = (limit: number) => Math.floor(next() * limit);
  const seeds = [...VECTORS.map(({ data }) => data), ...GOLDEN.map(({ made }) => made), request("0027 0004 00500000")];
  const servers = [openServer(), openServer({ hosts: HOSTS })];
  let answers = 0, understood = 0;
  for (let i = 0; i < 20_000; i++) {
    let data: Uint8Array = Uint8Array.from(seeds[below(seeds.length)]!);
    for (let changes = below(4); changes > 0; changes--) {
      const at = below(data.length + 1), kind = below(4);
      if (kind === 0) data = concat(data.subarray(0, at), data.subarray(at + 1 + below(8)));
      else if (kind === 1) data = concat(data.subarray(0, at), data.subarray(at - below(12)), data.subarray(at));
      else if (at < data.length) data[at] = kind === 2 ? below(256) : data[at]! ^ 1 << below(8);
    }
    data = data.subarray(0, MAX_DATAGRAM_BYTES);
    if (below(2) > 0 && data.length >= 20) data.set(bytes(two(data.length - 20)), 2); // else most die of their length
    const stun = decodeStun(data);
    if (stun) understood++;
    const [server, socket] = [servers[i % 2]!, below(i % 2 ? 5 : 3)];
    const effects = server.receive({ socket, from: i % 3 ? V4 : V6, data }, T0 + 1_000 * i);
    assert.ok(effects.length <= (stun?.kind === "request" ? 1 : 0), hex(data));
    for (const effect of effects) {
      assert.ok(effect.kind === "send" && hostOf(effect.to) === hostOf(i % 3 ? V4 : V6), hex(data));
      assert.ok(effect.data.length <= (i % 2 ? 4.6 : 2.2) * data.length, hex(data));
      answers++;
    }
  }
  assert.ok(understood > 4_000 && answers > 2_000, `${understood} understood, ${answers} answered`);
});

test("server answers no response, no error and no indication, and nobody at an endpoint that is none", () => {
  const server = openServer();
  const plain = hex(encodeStunRequest({ transaction: TRANSACTION }));
  for (const type of ["0101", "0111", "0011"]) assert.deepEqual(ask(server, bytes(type + plain.slice(4))), []);
  assert.deepEqual(ask(server, bytes(plain), { from: "192.0.2.9:0" }), []);
  assert.equal(ask(server, bytes(plain)).length, 1);
});

// -- in the simulated internet

type Answer = { from: Endpoint; stun: Stun };

/** A host that asks STUN questions with one socket, and a server with one address or two. */
function stage({ hosts, nat }: { hosts?: [string, string]; nat?: string } = {}) {
  const net = createNetwork({ seed: "stun" });
  const [address, other] = hosts ?? HOSTS;
  const host = net.host({ name: "server", addresses: hosts ? [address, other!] : [address], delayMs: 10 });
  host.run(makeServer({ hosts }), {
    ports: [2280, 2281, 50_000].map((port) => ({ port, address }))
      .concat(hosts ? [2280, 2281].map((port) => ({ port, address: other! })) : []),
  });
  const box = nat === undefined ? undefined : net.nat({ name: "nat", address: "203.0.113.1", ...NATS[nat]! });
  const asker: Machine<Answer> = {
    opened: () => [],
    wake: () => [],
    wakeAt: () => Infinity,
    receive: ({ from, data }) => [{ kind: "event", event: { from, stun: decodeStun(data)! } }],
  };
  const inside = box ? "192.168.1.10" : "198.51.100.7";
  const client = net.host({ name: "asker", addresses: [inside], behind: box, delayMs: 10 });
  const program = client.run(asker, { ports: [4000] });
  let questions = 0;
  return {
    /** What comes back within a second. */
    ask(to: Endpoint, change: { changeIp?: boolean; changePort?: boolean; classic?: boolean } = {}): Answer | null {
      const before = program.events.length;
      const transaction = (change.classic ? "01020304" : STUN_COOKIE) + (++questions).toString(16).padStart(24, "0");
      program.call(() => [{ kind: "send", socket: 0, to, data: encodeStunRequest({ transaction, ...change }) }]);
      net.run(1_000);
      const answers = program.events.slice(before).map(({ event }) => event);
      assert.ok(answers.length <= 1 && answers.every(({ stun }) => stun.transaction === transaction));
      return answers[0] ?? null;
    },
  };
}

test("server answers from the socket that was asked, from its third port, and from its other address", () => {
  const { ask } = stage({ hosts: HOSTS });
  const [one, other] = HOSTS;
  const rows: [to: Endpoint, same: Endpoint, port: Endpoint, address: Endpoint, both: Endpoint][] = [
    [`${one}:2280`, `${one}:2280`, `${one}:50000`, `${other}:2280`, `${other}:2281`],
    [`${one}:2281`, `${one}:2281`, `${one}:50000`, `${other}:2281`, `${other}:2280`],
    [`${other}:2280`, `${other}:2280`, `${other}:2281`, `${one}:2280`, `${one}:2281`],
    [`${other}:2281`, `${other}:2281`, `${other}:2280`, `${one}:2281`, `${one}:2280`],
  ];
  for (const classic of [false, true]) {
    for (const [to, same, port, address, both] of rows) {
      const wanted = [[same, {}], [port, { changePort: true }], [address, { changeIp: true }]] as const;
      for (const [from, change] of [...wanted, [both, { changeIp: true, changePort: true }] as const]) {
        const answer = ask(to, { ...change, classic });
        assert.equal(answer?.from, from, `${to} ${JSON.stringify(change)}`);
        const { kind, mapped, origin, other } = answer.stun;
        assert.deepEqual([kind, mapped], ["response", "198.51.100.7:4000"]);
        assert.deepEqual([origin, other], [from, both], "RESPONSE-ORIGIN and OTHER-ADDRESS");
      }
    }
  }
});

test("server with one address answers from its third port, and refuses to answer from another address", () => {
  const { ask } = stage();
  for (const port of [2280, 2281]) {
    const to = `192.0.2.1:${port}`;
    const same = ask(to)!, third = ask(to, { changePort: true })!;
    assert.deepEqual([same.from, third.from], [to, "192.0.2.1:50000"]);
    for (const { stun } of [same, third]) {
      assert.deepEqual([stun.mapped, stun.origin, stun.other], ["198.51.100.7:4000", undefined, undefined]);
    }
    for (const changePort of [false, true]) {
      const refusal = ask(to, { changeIp: true, changePort })!; // RFC 5780, section 6.1: 420
      assert.deepEqual([refusal.from, refusal.stun.kind], [to, "error"]);
      assert.equal(
        ask(to, { changeIp: true, changePort, classic: true }),
        null,
        "it would take an error for the answer",
      );
    }
  }
});

test("server refuses what it does not do with an error 420 that names it", () => {
  const aimed = request("0002 0008 0001 0050 c0000209" + "0003 0004 00000006"); // RESPONSE-ADDRESS
  const [answer] = ask(openServer({ hosts: HOSTS }), aimed);
  assert.deepEqual([answer?.socket, answer?.to], [0, V4], "from where it was asked, whatever else it was asked for");
  assert.equal(hex(answer!.data), `01110010${TRANSACTION}0009000400000414000a000200020000`);
  const [refusal] = ask(openServer(), request("0027 0004 00500000"));
  assert.equal(refusal?.to, V4);
  assert.equal(hex(refusal!.data), `01110010${TRANSACTION}0009000400000414000a000200270000`);
  const [other] = ask(openServer(), encodeStunRequest({ transaction: TRANSACTION, changeIp: true }));
  assert.equal(hex(other!.data), `01110010${TRANSACTION}0009000400000414000a0002${two(STUN_CHANGE_REQUEST)}0000`);
});

test("server with two addresses answers to another port, of the asker's own address alone", () => {
  const [answer] = ask(openServer({ hosts: HOSTS }), request("0027 0004 00500000" + "0003 0004 00000006"));
  assert.deepEqual([answer?.socket, answer?.to], [4, formatEndpoint(hostOf(V4), 0x50)]);
  assert.equal(decodeStun(answer!.data)?.mapped, V4);
});

/** What one learns of a NAT from a server with two addresses (RFC 5780, sections 4.3 and 4.4). */
for (const nat of ["EIM+EIF random", "EIM+ADF random", "EIM+APDF random", "ADM+ADF random", "APDM+APDF random"]) {
  test(`STUN finds ${nat} out`, () => {
    const { ask } = stage({ hosts: HOSTS, nat });
    const main = ask("192.0.2.1:2280")!;
    const filtering = ask("192.0.2.1:2280", { changeIp: true, changePort: true })
      ? "EIF"
      : ask("192.0.2.1:2280", { changePort: true })
      ? "ADF"
      : "APDF";
    const again = ask("192.0.2.1:2280")!;
    assert.equal(again.stun.mapped, main.stun.mapped, "the test has not spoilt the mapping");
    const elsewhere = ask("192.0.2.2:2280")!, farther = ask("192.0.2.2:2281")!;
    const mapping = elsewhere.stun.mapped === main.stun.mapped
      ? "EIM"
      : elsewhere.stun.mapped === farther.stun.mapped
      ? "ADM"
      : "APDM";
    assert.equal(`${mapping}+${filtering} random`, nat);
  });
}

test("WELCOME names the second and the third port", () => {
  const server = openServer(), keys = keysFrom(new Uint8Array(32).fill(7)), id = "00000000000000aa";
  const login = {
    type: "LOGIN",
    key: keys.public,
    proof: "0".repeat(16),
    terms: { version: VERSION, flag: false },
    direct: 1,
    rttMs: 0,
    name: "alice",
  } as const;
  const say = (cookie: string, key?: Uint8Array) =>
    ask(server, encode({ ...login, cookie, local: [] }, { id, counter: 1, key }))[0]!.data;
  const cookie = decode(say("0".repeat(16)));
  assert.equal(cookie?.type, "COOKIE");
  const shared = diffieHellman(keys.secret, cookie.key)!;
  const data = say(cookie.cookie, loginKey(shared, id));
  const welcome = decode(data);
  assert.equal(welcome?.type, "WELCOME");
  assert.ok(verifies(data, controlKeys(shared, welcome.token).toClient));
  assert.deepEqual([welcome.secondPort, welcome.thirdPort], [2281, 50_000]);
});

// ---------------------------------------------------------------------------------------------------- limits

test("one address gets 400 answers at once and 50 a second, then silence; others are not touched", () => {
  const server = openServer();
  const from = (i: number) => formatEndpoint(`203.0.113.${i % 256}`, 1_024 + i); // a /24 is one address
  assert.equal(answered(server, 500, { from }), 400);
  assert.equal(answered(server, 500, { from, now: T0 + 1_000 }), 50);
  assert.equal(answered(server, 50, { from: (i) => formatEndpoint("203.0.112.1", 1_024 + i) }), 50);
  const v6 = (i: number) => formatEndpoint(`2001:db8:7:${i.toString(16)}::1`, 1_024 + i); // and so is a /48
  assert.equal(answered(server, 500, { from: v6 }), 400);
  assert.equal(answered(server, 50, { from: () => "[2001:db8:8::1]:5000" }), 50);
});

test("errors count as answers, and whoever is at the limit can still log in", () => {
  const server = openServer();
  let errors = 0;
  for (let i = 0; i < 500; i++) errors += ask(server, request("0027 0004 00500000")).length;
  assert.equal(errors, 400);
  const key = new Uint8Array(32), nothing = "0".repeat(16);
  const login = {
    type: "LOGIN",
    cookie: nothing,
    key,
    proof: nothing,
    terms: { version: VERSION, flag: false },
    direct: 1,
    rttMs: 0,
    name: "a",
    local: [],
  };
  const [answer] = ask(server, encode(login as Parameters<typeof encode>[0], { id: nothing, counter: 1 }));
  assert.equal(decode(answer!.data)?.type, "COOKIE");
});

const site = (i: number) => formatEndpoint(`${20 + (i >> 16)}.${i >> 8 & 255}.${i & 255}.1`, 4_000);

test("all addresses together get 2,000 answers a second", () => {
  const server = openServer();
  assert.equal(answered(server, 5_000, { from: site }), 2_000);
  assert.equal(answered(server, 5_000, { from: site, now: T0 + 500 }), 1_000);
});

test("any number of addresses has limits of their own, nothing of it has to be forgotten, and users have a reserve", () => {
  const server = openServer();
  for (let i = 0; i < 30_000; i += 2_000) answered(server, 2_000, { from: (j) => site(i + j), now: T0 + i });
  assert.equal(server.wakeAt(), Infinity, "nobody is woken for it");
  const later = T0 + 40_000;
  assert.equal(answered(server, 2_000, { from: (i) => site(40_000 + i), now: later }), 2_000, "newcomers have theirs");
  assert.equal(answered(server, 100, { from: site, now: later }), 0, "all are used up");
  const user = enter(server, hand("user", dice("reserve")), { from: "203.0.113.77:4000", now: later });
  assert.ok(user);
  assert.equal(answered(server, 100, { from: (i) => `203.0.113.78:${5_000 + i}`, now: later }), 100, "but not theirs");
});

test("an answer is at most 1.6 times its question, 2.2 with IPv6; 2.8 and 4.6 with a second address", () => {
  const questions: [string, Uint8Array][] = [
    ["request", encodeStunRequest({ transaction: TRANSACTION })],
    ["change port", encodeStunRequest({ transaction: TRANSACTION, changePort: true })],
    ["change address", encodeStunRequest({ transaction: TRANSACTION, changeIp: true })],
    ["change both", encodeStunRequest({ transaction: TRANSACTION, changeIp: true, changePort: true })],
    ["classic", encodeStunRequest({ transaction: CLASSIC })],
    ["classic, change port", encodeStunRequest({ transaction: CLASSIC, changePort: true })],
    ["RFC 5769, 2.1", VECTORS[0]!.data],
    ...[1, 2, 3, 9, 290].map((count): [string, Uint8Array] => [
      `${count} unknown`,
      request("7f00 0000".repeat(count)),
    ]),
    ["1 unknown, classic", request("7f00 0000", CLASSIC)],
  ];
  const table: string[] = [];
  const measure = (options: Partial<ServerOptions>, from: Endpoint) => {
    const server = openServer(options);
    return questions.map(([name, data]) => {
      const bytes = ask(server, data, { from }).reduce((sum, answer) => sum + answer.data.length, 0);
      table.push(`${name.padEnd(22)} ${data.length} -> ${bytes} bytes, ${(bytes / data.length).toFixed(2)}`);
      return bytes / data.length;
    });
  };
  const worst = (options: Partial<ServerOptions>, from: Endpoint) => {
    table.push(`-- from ${from}, ${options.hosts ? "two addresses" : "one address"}`);
    return Math.max(...measure(options, from));
  };
  const ratios = [worst({}, V4), worst({}, V6), worst({ hosts: HOSTS }, V4)];
  ratios.push(worst({ hosts: ["2001:db8:5::1", "2001:db8:5::2"] }, V6));
  console.log(table.join("\n"));
  assert.deepEqual(ratios, [1.6, 2.2, 2.8, 4.6]);
});
