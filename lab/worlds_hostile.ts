/**
 * The worlds of the oracle in which somebody means harm: strangers, observers, rogues who are logged in, evil servers;
 * and what the limits make of them.
 *
 * @module
 */
import { type Control, type ControlBody, decode, encode, encodeStunRequest, type Endpoint } from "../protocol.ts";
import { concat, controlKeys, diffieHellman, hex, type KeyPair, keysFrom, loginKey } from "../protocol.ts";
import {
  decodeHandshake,
  encodeClock,
  encodeHandshake,
  encodeInner,
  initiate,
  openPeer,
  type Peer,
  sealPeer,
} from "../protocol.ts";
import { parseEndpoint, publicNonce, STUN_COOKIE, type User } from "../protocol.ts";
import { VERSION } from "../protocol.ts";
import { crowd, DELAY_MS, join, login, type Player, type World } from "./scenario.ts";
import { again, ask, dice, EIM, isServers, pair, part, SERVER, talk, world } from "./worlds.ts";

// ---------------------------------------------------------------------------------------------------- strangers, observers

const STUN: Parameters<typeof encodeStunRequest>[0][] = [
  { transaction: `${STUN_COOKIE}000000000000000000000001` },
  { transaction: "00112233445566778899aabbccddeeff" },
  ...[true, false].flatMap((changeIp) => [
    { transaction: `${STUN_COOKIE}00000000000000000000000${Number(changeIp)}`, changeIp, changePort: true },
    { transaction: `001122334455667788990011223344${Number(changeIp)}0`, changeIp, changePort: !changeIp },
  ]),
];
for (const hosts of [undefined, ["192.0.2.1", "192.0.2.2"]] as [string, string][]) {
  world(`stranger: STUN questions, ${hosts ? "two addresses" : "one address"}`, { server: { hosts } }, (world) => {
    const ask = (from: Endpoint, to: Endpoint, data: Uint8Array) => world.net.inject({ from, to, data });
    for (const port of [2280, 2281, 2282]) {
      for (const question of STUN) ask("198.18.0.1:5000", `192.0.2.1:${port}`, encodeStunRequest(question));
    }
    const plain = encodeStunRequest(STUN[0]!);
    const attribute = (type: number, ...value: number[]) => {
      const data = concat(plain, Uint8Array.of(type >> 8, type & 255, 0, value.length, ...value));
      data[3] = data.length - 20;
      return data;
    };
    ask("198.18.0.1:5000", SERVER, attribute(0x0027, 0x13, 0x88, 0, 0)); // answer to another port
    ask("198.18.0.1:5000", SERVER, attribute(0x7777, 1, 2, 3, 4)); // must be understood
    ask("198.18.0.1:5000", SERVER, attribute(0x8888, 1, 2, 3, 4)); // need not be
    ask("198.18.0.1:5000", SERVER, plain.subarray(0, 19));
    world.machine.receive({ socket: 0, from: "198.18.0.1:0", data: plain }, world.net.now());
    ask("198.18.0.1:5000", SERVER, world.bytes(20).fill(1, 0, 1));
    world.net.run(1_000);
    for (let i = 0; i < 450; i++) ask("198.18.0.9:5000", SERVER, plain); // more than one address may ask
    world.net.run(1_000);
    for (let i = 0; i < 70; i++) ask("198.18.0.9:5000", SERVER, plain);
    world.net.run(60_000);
  });
}
world("limit: STUN of all addresses together, and of those that are not remembered", {}, (world) => {
  const data = encodeStunRequest(STUN[0]!), from = (i: number) => `10.${i >> 8 & 255}.${i & 255}.1:1`;
  for (let i = 0; i < 10_100; i++) {
    world.machine.receive({ socket: 0, from: from(i), data }, world.net.now());
    if (i % 500 === 499) world.net.run(200);
  }
  for (let i = 10_100; i < 10_350; i++) world.machine.receive({ socket: 0, from: from(i), data }, world.net.now());
  world.net.run(20_000);
});
/** Datagrams as they were, but for some bytes. */
function mutate(data: Uint8Array, below: (limit: number) => number): Uint8Array {
  const changed = data.slice(0, below(4) ? data.length : below(data.length));
  for (let flips = below(6); flips > 0 && changed.length > 0; flips--) changed[below(changed.length)]! ^= 1 << below(8);
  return changed;
}
for (const nat of [null, "EIM+EIF random", "APDM+APDF random"]) {
  world(`stranger: garbage and mutants, to and from all, ${nat ?? "public"}`, {}, (world) => {
    const seen: { from: Endpoint; to: Endpoint; data: Uint8Array }[] = [], below = dice(`garbage ${nat}`);
    world.net.tap(({ host, from, to, data }) => void (host && seen.push({ from, to, data: data.slice() })));
    const [alice, bob] = pair(world, { nat }, { nat });
    for (let round = 0; round < 10; round++) {
      talk(world, alice, bob, { count: 2 });
      for (let i = 0; i < 100; i++) {
        const { from, to, data } = seen[below(seen.length)]!, other = seen[below(seen.length)]!;
        world.net.inject({ from: below(3) ? from : other.from, to, data: mutate(data, below) });
        world.net.inject({
          from,
          to: other.to,
          data: concat(Uint8Array.of(below(5) ? 0x50 : below(256), below(110)), data.subarray(2)),
        });
      }
    }
    world.restartServer();
    talk(world, alice, bob, { count: 20 });
  });
}
for (const nat of ["EIM+EIF random", "APDM+APDF random"]) {
  world(`observer: repeats all that he sees, at once and later, from there and from elsewhere, ${nat}`, {}, (world) => {
    const seen: { from: Endpoint; to: Endpoint; data: Uint8Array }[] = [];
    world.net.tap(({ host, from, to, data }) => {
      if (host === "") return;
      seen.push({ from, to, data: data.slice() });
      world.net.inject({ from, to, data });
      world.net.inject({ from: "198.18.0.1:53", to, data });
    });
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob);
    ask(world, alice, "bob");
    for (const { from, to, data } of seen.slice()) {
      world.net.inject({ from, to, data });
      world.net.inject({ from: "198.18.0.1:53", to, data });
      world.net.run(1);
    }
    bob.command({ command: "exit" });
    world.net.run(1_000);
    for (const { from, to, data } of seen.slice()) world.net.inject({ from, to, data });
    talk(world, alice, bob);
    const second = again(world, bob);
    talk(world, alice, second);
  });
  world(`observer: his copies from elsewhere overtake, ${nat}`, {}, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    const below = dice("overtake");
    world.net.tap(({ host, from, to, data }) => {
      if (host === "" || below(3)) return;
      world.net.inject({ from: "198.18.0.1:53", to, data });
      const copy = data.slice();
      world.net.after(60, () => world.net.inject({ from, to, data: copy }));
      return "drop";
    });
    talk(world, alice, bob, { count: 30 });
    world.net.run(30_000);
    talk(world, alice, bob);
  });
}

// ---------------------------------------------------------------------------------------------------- rogues

const NO_ID = "0".repeat(16), UNKNOWN = { mapping: "unknown", filtering: "unknown", allocation: "unknown" } as const;
type Body<T> = Extract<ControlBody, { type: T }>;
const LOGIN: Body<"LOGIN"> = {
  ...{ type: "LOGIN", cookie: NO_ID, key: new Uint8Array(32).fill(9), proof: NO_ID },
  ...{ terms: { version: VERSION, flag: false }, direct: 1, rttMs: 0, name: "x", local: [] },
};
const KEEPALIVE: Body<"KEEPALIVE"> = { type: "KEEPALIVE", cookie: NO_ID, rttMs: 80, nat: UNKNOWN, local: [] };

/** A user by hand, who keeps none of the rules; he speaks straight to the server's machine. */
function rogue(world: World, name: string, from: Endpoint, { keys = world.keys(), keepName = false, clock = 0 } = {}) {
  const id = hex(world.bytes(8)), people = new Map<string, User>();
  const me = {
    name,
    keys,
    nonce: publicNonce(id),
    token: "",
    from,
    people,
    sent: clock || Math.floor(world.net.now()),
  };
  /** What comes back; what is for others goes to them. */
  const say = (data: Uint8Array, at = me.from): Control[] => {
    const effects = world.machine.receive({ socket: 0, from: at, data }, world.net.now());
    world.server.perform(effects);
    const answers = effects.flatMap((effect) =>
      effect.kind === "send" && effect.to === at ? [decode(effect.data)!] : []
    );
    for (const answer of answers) {
      if ("users" in answer) {
        for (const user of answer.users) people.set(user.name, user);
      }
    }
    return answers;
  };
  const login = (cookie: string, key?: Uint8Array) => {
    const fields = { ...LOGIN, cookie, key: keys.public, terms: { version: VERSION, flag: keepName }, name };
    return encode(fields, { id, counter: me.sent, key });
  };
  const [challenge] = say(login(NO_ID));
  if (challenge?.type !== "COOKIE") throw new Error("No cookie");
  const shared = diffieHellman(keys.secret, challenge.key)!, claim = login(challenge.cookie, loginKey(shared, id));
  const [welcome] = say(claim);
  const macs = welcome?.type === "WELCOME" ? controlKeys(shared, welcome.token) : null;
  if (welcome?.type === "WELCOME") me.token = welcome.token;
  const seal = (message: ControlBody, counter = ++me.sent) =>
    encode(message, { id: me.token, counter, key: macs?.toServer });
  return { ...me, claim, raw: say, seal, say: (message: ControlBody, at?: Endpoint) => say(seal(message), at) };
}
type Rogue = ReturnType<typeof rogue>;

world("limit: a noisy user's calls, reports, relayed bytes, errors, pages and datagrams", {}, (world) => {
  const alice = join(world, "alice");
  login(world, alice);
  crowd(world, Array.from({ length: 300 }, (_, i) => `user-${i}`));
  const noisy = rogue(world, "noisy", "198.18.9.9:9");
  const nonce = noisy.say({ type: "GETALLUSER", prefix: "alice", after: "" }) && noisy.people.get("alice")!.nonce;
  const trans = (to: string, call: number, body: Uint8Array, of = nonce) =>
    ({ type: "P2PTRANS", to, nonce: of, call, body }) as const;
  for (let i = 0; i < 130; i++) noisy.say(trans("alice", 1, new Uint8Array(0), i % 2 ? nonce : NO_ID));
  for (let i = 0; i < 230; i++) noisy.say({ type: "PUNCHED", peer: i % 9 ? "alice" : "nobody" });
  for (let i = 0; i < 700; i++) noisy.say(trans("alice", 0, new Uint8Array(900)));
  noisy.say(trans("alice", 0, new Uint8Array(908)));
  world.net.run(5_000);
  for (let i = 0; i < 30; i++) noisy.say(trans("nobody", 0, new Uint8Array(9)));
  for (let i = 0; i < 150; i++) noisy.say({ type: "GETALLUSER", prefix: "", after: "" });
  world.net.run(1_000);
  for (let i = 0; i < 5_200; i++) noisy.say(KEEPALIVE);
  world.net.run(1_000);
  noisy.say(trans("alice", 1, world.bytes(100)));
  noisy.say(trans("noisy", 1, world.bytes(100)));
  noisy.say({ type: "LOGOUT" });
  alice.send("noisy", "gone?");
  world.net.run(5_000);
});
world("limit: strangers without a cookie, and those who seem to have one", {}, (world) => {
  const alice = join(world, "alice");
  login(world, alice);
  for (const cookie of [NO_ID, "0".repeat(15) + "1"]) {
    const data = encode({ ...LOGIN, cookie }, { id: NO_ID, counter: 1, key: undefined });
    for (let i = 0; i < 5_300; i++) {
      world.machine.receive({ socket: 0, from: `198.18.1.1:${i + 1}`, data }, world.net.now());
    }
  }
  join(world, "bob");
  world.net.run(5_000);
});
world("limit: logins of one address", { server: { maxPerAddress: 5 } }, (world) => {
  const someone = rogue(world, "someone", "100.64.1.1:1");
  const broken = someone.claim.slice();
  broken[broken.length - 1]! ^= 1;
  for (let i = 0; i < 2_100; i++) someone.raw(broken);
  rogue(world, "late", "100.64.1.7:1");
  rogue(world, "other", "100.64.2.1:1");
  world.net.run(200);
  rogue(world, "late", "100.64.1.7:1");
  world.net.run(90_000);
});
world(
  "limit: users of one address who have moved there, and moves of one of them",
  { server: { maxPerAddress: 2 } },
  (world) => {
    const move = (user: Rogue, to: Endpoint) => {
      const challenge = user.say(KEEPALIVE, to).find(({ type }) => type === "COOKIE");
      const cookie = challenge?.type === "COOKIE" ? challenge.cookie : NO_ID;
      user.say({ ...KEEPALIVE, cookie }, to);
      user.say({ ...KEEPALIVE, cookie: NO_ID }, to);
    };
    const users = [1, 2, 3].map((i) => rogue(world, `user-${i}`, `100.64.${i}.1:1`));
    users.forEach((user, i) => move(user, `100.64.9.${i}:1`));
    rogue(world, "late", "100.64.9.9:1");
    move(users[0]!, "[2001:db8:9::1]:1");
    for (let i = 0; i < 15; i++) move(users[2]!, `100.65.${i}.1:${i + 1}`);
    world.net.run(2_000);
    for (let i = 0; i < 15; i++) move(users[2]!, `100.66.${i}.1:${i + 1}`);
    world.net.run(70_000);
  },
);
world("limit: logins that are repeated, held back, or older", {}, (world) => {
  const keys = world.keys();
  const first = rogue(world, "alice", "100.64.1.1:1", { keys, clock: 5, keepName: true });
  first.raw(first.claim);
  first.raw(first.claim, "100.64.1.2:1");
  const second = rogue(world, "alice", "100.64.1.3:1", { keys, clock: 6 });
  first.raw(first.claim);
  rogue(world, "alice", "100.64.1.3:1", { keys, clock: 4 });
  rogue(world, "alice", "100.64.1.3:1");
  second.say({ type: "LOGOUT" });
  first.raw(first.claim);
  second.raw(second.claim);
  world.net.run(1_000);
  const other = rogue(world, "alice", "100.64.7.7:1");
  other.say({ type: "LOGOUT" });
  first.raw(first.claim);
  second.raw(second.claim);
  world.net.run(70_000);
  second.raw(second.claim);
  rogue(world, "alice", "100.64.1.3:1", { keys, clock: 7 });
  rogue(world, "two words", "100.64.1.3:1");
  world.net.run(1_000);
});
world("limit: counters of a session", {}, (world) => {
  const user = rogue(world, "user", "100.64.1.1:1"), ask = { type: "GETALLUSER", prefix: "", after: "" } as const;
  for (const counter of [5_000, 5_000, 4_999, 4_999, 5_000 - 2_048, 3_000, 2 ** 48 - 1, 6_000]) {
    user.raw(user.seal(ask, user.sent + counter));
  }
  user.raw(user.seal({ type: "ALIVE", asked: 1, cookie: NO_ID, public: "100.64.1.1:1" }, 2 ** 47));
  user.raw(user.seal({ type: "PUNCHED", peer: "user" }, 2 ** 47 + 1).subarray(0, 40));
  world.net.run(1_000);
});
world("limit: names that were here, the last 10,000", {}, (world) => {
  const alice = join(world, "alice");
  login(world, alice);
  const names = Array.from({ length: 10_100 }, (_, i) => `n${i}`);
  crowd(world, names, { keepName: true }); // all of them vanish, and hold their names
  alice.command({ command: "getu", prefix: "n100" });
  world.net.run(1_000);
  for (const name of ["n0", "n1", "n10049"]) alice.send(name, "hi");
  world.net.run(90_000);
  for (const name of names.filter((_, i) => i % 1_000 === 0)) alice.send(name, "hi");
  world.net.run(300_000);
  const others = Array.from({ length: 20 }, (_, i) => rogue(world, `late-${i}`, `198.18.200.${i}:4000`));
  for (const other of others) other.say({ type: "LOGOUT" }); // now there are names that nobody holds
  for (const name of ["n100", "n101", "n119", "n120", "n10099", "late-0"]) alice.send(name, "hi");
  world.net.run(3_000);
});

/** A session of the rogue with a client, begun by a first message that carries `frame`; answers with what seals the others. */
function befriend(world: World, rogue: Rogue, to: string, frame: Peer, { echoes = true } = {}) {
  const theirs = rogue.say({ type: "GETALLUSER", prefix: to, after: "" }) && rogue.people.get(to)!;
  const { host, port } = parseEndpoint(rogue.from)!;
  const options = {
    own: rogue.keys,
    peer: theirs.key,
    psk: new Uint8Array(32),
    prologue: new TextEncoder().encode(`punch ${rogue.name} ${rogue.nonce} ${to} ${theirs.nonce}`),
    ephemeral: world.keys(),
  };
  const initiation = initiate(
    options,
    concat(world.bytes(8), encodeClock(Math.floor(world.net.now())), encodeInner(frame)),
  )!;
  const session = { index: 0, key: new Uint8Array(32), counter: 0 };
  let receives: Uint8Array | null = null;
  const seal = (frame: Peer, counter = session.counter++) => sealPeer(frame, { ...session, counter });
  world.net.host({ name: `host of ${rogue.name}`, addresses: [host], delayMs: DELAY_MS }).run({
    opened: () => [],
    wake: () => [],
    wakeAt: () => Infinity,
    receive({ socket, from, data }) {
      const message = decode(data), handshake = decodeHandshake(message && "body" in message ? message.body : data);
      const finished = handshake?.type === "P2PSECOND" && session.index === 0 && initiation.finish(handshake.noise);
      if (finished) Object.assign(session, { index: handshake.from, key: finished.keys.send });
      if (finished) receives = finished.keys.receive;
      // He answers punches, but no messages: so there is a direct path to him.
      const frame = receives && openPeer(handshake?.type === "P2PSECOND" ? handshake.sealed : data, receives);
      if (frame?.type !== "P2PTRASH" || !echoes) return [];
      return [{ kind: "send", socket, to: from, data: seal({ type: "P2PECHO", probe: frame.probe }) }];
    },
  }, { ports: [port] });
  const relay = (body: Uint8Array, call = 0) => rogue.say({ type: "P2PTRANS", to, nonce: theirs.nonce, call, body });
  const first = encodeHandshake({ type: "P2PFIRST", from: 7, probe: 1, noise: initiation.message });
  relay(first, 1);
  world.net.run(500);
  const write = (data: Uint8Array, from = rogue.from) => world.net.inject({ from, to: theirs.public, data });
  return { first, host, relay, seal, write };
}

const message = (seq: number, length: number, { base = 0, left = 0 } = {}): Peer => ({
  type: "P2PMESSAGE",
  seq,
  base,
  left,
  part: new TextEncoder().encode(part(length)),
});
const HELLO = concat(encodeClock(1), encodeInner(message(0, 5)));
const STREAMS: Record<string, (i: number) => Peer> = {
  "parts without bytes, never the last": (i) => message(i, 0, { left: 65_535 }),
  "full parts, never the last": (i) => message(i, 800, { left: 65_535 }),
  "every other part": (i) => message(2 * i + 1, 1, { base: i }),
  "numbers far ahead": (i) => message(2 ** 32 - 1 - i, 1, { left: i % 2 }),
  "a base that jumps": (i) => message(100_000 * i, 1, { base: 100_000 * i, left: i % 2 }),
  "a base after its part": (i) => message(i, 1, { base: i + 1 }),
  "parts that are too long": (i) => message(i, 801 + i % 300, { left: i % 2 }),
  "wrong numbers of parts left": (i) => message(i, i % 3 ? 800 : 400, { left: (7 * i) % 5 }),
  "acknowledgements of what was never said": (i) => ({
    type: "P2PMESSAGEACK",
    next: i < 60 ? 0 : 7 * i,
    from: i % 3 * i * 5,
    states: new Uint8Array(3 * i % 8).fill(i),
  }),
  "acknowledgements from far ahead": (i) => ({
    type: "P2PMESSAGEACK",
    next: i,
    from: i + 9,
    states: new Uint8Array(9),
  }),
  "echoes and punches": (i) => ({ type: i % 2 ? "P2PECHO" : "P2PTRASH", probe: i }),
  "plans": (i) => ({
    type: "P2PPLAN",
    attempt: i % 7 === 6 ? 100 : i % 7,
    spray: i % 2,
    ports: Array.from({ length: i % 65 }, (_, port) => 1_024 + port * i),
  }),
};
for (const [what, frame] of Object.entries(STREAMS)) {
  world(`rogue: a peer sends ${what}`, {}, (world) => {
    const [alice, bob] = pair(world, {});
    talk(world, alice, bob);
    const mallory = rogue(world, "mallory", "198.18.9.9:9");
    const { first, host, relay, seal, write } = befriend(world, mallory, "alice", message(0, 5), {
      echoes: what !== "plans" && what !== "acknowledgements from far ahead",
    });
    alice.send("mallory", part(3_000));
    for (let i = 1; i < 120; i++) {
      const data = seal(frame(i));
      if (i % 3) write(data);
      else relay(data, Number(i % 9 === 0));
      if (i % 5 === 0) write(seal(frame(i)), `${host}:${10 + i}`); // from another port
      if (i % 7 === 0) write(seal(frame(i + 1))); // at the same instant
      if (i % 30 === 0) alice.send("mallory", part(1_000));
      if (i % 11 === 0) write(first, `${host}:${10 + i}`);
      if (i % 13 === 0) relay(first);
      if (i % 17 === 0) write(seal(frame(i), 2_000 + i)), write(seal(frame(i), 2_000 + i)); // counters ahead, and twice
      world.net.run(20);
    }
    talk(world, alice, bob);
    mallory.say({ type: "LOGOUT" });
    world.net.run(20_000);
  });
}
world("rogue: a peer sends messages of 64 KiB, of one byte more, and of one part more", {}, (world) => {
  const [alice, bob] = pair(world, {});
  const { seal, write } = befriend(world, rogue(world, "mallory", "198.18.9.9:9"), "alice", message(0, 5));
  let seq = 1;
  for (const [full, rest] of [[81, 736], [81, 737], [82, 1], [83, 800], [0, 9]] as const) {
    for (let left = full; left >= 0; left--) {
      write(seal(message(seq++, left > 0 ? 800 : rest, { base: 0, left })));
      world.net.run(2);
    }
    world.net.run(100);
  }
  talk(world, alice, bob);
});
world("rogue: a peer comes from hundreds of ports of his host", {}, (world) => {
  const [alice, bob] = pair(world, {});
  const { host, seal, write } = befriend(world, rogue(world, "mallory", "198.18.9.9:9"), "alice", message(0, 5));
  for (let i = 1; i < 400; i++) {
    write(seal({ type: "P2PTRASH", probe: i }), `${host}:${i}`);
    if (i % 20 === 0) world.net.run(100);
  }
  talk(world, alice, bob);
});
world("rogue: a peer begins one handshake after another", {}, (world) => {
  const [alice, bob] = pair(world, {});
  alice.command({ command: "verify", peer: "mallory-3" });
  for (let i = 0; i < 30; i++) {
    const mallory = rogue(world, `mallory-${i % 5}`, `198.18.9.${i}:9`);
    befriend(world, mallory, "alice", i % 3 ? message(0, 5) : { type: "P2PTRASH", probe: 1 });
    mallory.say({ type: "LOGOUT" });
  }
  const mallory = rogue(world, "mallory", "198.18.10.1:9"), nonce = alice.events("login").length && NO_ID;
  for (let i = 0; i < 30; i++) {
    mallory.say({ type: "P2PTRANS", to: "alice", nonce: nonce || NO_ID, call: 1, body: world.bytes(99) });
  }
  talk(world, alice, bob);
});
world("rogue: thousands of handshakes, of which the first are forgotten", {}, (world) => {
  const [alice, bob] = pair(world, {});
  const callers = Array.from({ length: 220 }, (_, i) => rogue(world, `caller-${i}`, `198.18.30.${i}:9`));
  for (const caller of callers) {
    caller.say({ type: "GETALLUSER", prefix: "alice", after: "" });
    const user = caller.people.get("alice")!, own = { own: caller.keys, peer: user.key, psk: new Uint8Array(32) };
    const names = new TextEncoder().encode(`punch ${caller.name} ${caller.nonce} alice ${user.nonce}`);
    for (let i = 0; i < 19; i++) {
      const { message: noise } = initiate(
        { ...own, prologue: names, ephemeral: world.keys() },
        concat(world.bytes(8), HELLO),
      )!;
      const body = encodeHandshake({ type: "P2PFIRST", from: i, probe: 0, noise });
      caller.say({ type: "P2PTRANS", to: "alice", nonce: user.nonce, call: 0, body });
      if (i === 0) caller.say({ type: "P2PTRANS", to: "alice", nonce: user.nonce, call: 1, body });
    }
    world.net.run(10);
  }
  talk(world, alice, bob);
});
world("rogue: hundreds of callers whom nobody knows", {}, (world) => {
  const [alice, bob] = pair(world, EIM);
  for (let i = 0; i < 300; i++) {
    const caller = rogue(world, `caller-${i}`, `198.18.${20 + i % 100}.7:9`);
    caller.say({ type: "GETALLUSER", prefix: "alice", after: "" });
    const { nonce } = caller.people.get("alice")!;
    caller.say({ type: "P2PTRANS", to: "alice", nonce, call: 1, body: world.bytes(i % 2 ? 0 : 120) });
  }
  talk(world, alice, bob, { count: 20 });
  world.net.run(30_000);
});

// ---------------------------------------------------------------------------------------------------- evil servers

/** Who has the server's keys, and sees what passes, says to its clients what it has not said. */
function evil(world: World, keys: KeyPair) {
  const logins = new Map<string, Uint8Array>(),
    sessions = new Map<string, { at: Endpoint; id: string; key: Uint8Array; sent: number }>();
  const names = new Map<string, string>();
  world.net.tap(({ data, to }) => {
    const message = decode(data);
    if (message?.type === "LOGIN") logins.set(message.id, message.key), names.set(message.id, message.name);
    const theirs = message?.type === "WELCOME" && logins.get(message.id);
    if (message?.type !== "WELCOME" || !theirs) return;
    const { toClient } = controlKeys(diffieHellman(keys.secret, theirs)!, message.token);
    sessions.set(names.get(message.id)!, { at: to, id: message.token, key: toClient, sent: message.counter + 100 });
  });
  return {
    logins,
    tell(name: string, message: ControlBody, from = SERVER) {
      const session = sessions.get(name)!, { at, id, key } = session;
      world.net.inject({ from, to: at, data: encode(message, { id, counter: ++session.sent, key }) });
    },
  };
}
const EVIL = keysFrom(new Uint8Array(32).fill(6));

world("evil server: says what makes no sense", { server: { keys: EVIL } }, (world) => {
  const { tell } = evil(world, EVIL), [alice, bob] = pair(world);
  const key = world.bytes(32), other = { name: "bob", nonce: hex(world.bytes(8)), key, nat: UNKNOWN, punchAfterMs: 0 };
  const users = [{ name: "carol", nonce: NO_ID, key, public: "198.18.0.1:53" }];
  const lies: ControlBody[] = [
    { type: "ERROR", reason: "offline", about: "bob", seconds: 0 },
    { type: "ERROR", reason: "unknown", about: "bob", seconds: 0 },
    { type: "ERROR", reason: "busy", about: "bob", seconds: 0 },
    { type: "ERROR", reason: "offline", about: "nobody", seconds: 0 },
    { type: "RELAYED", from: "nobody", nonce: NO_ID, body: world.bytes(50) },
    { type: "RELAYED", from: "bob", nonce: NO_ID, body: world.bytes(50) },
    { type: "PUNCHED", peer: "nobody" },
    { type: "PUNCHED", peer: "bob" },
    { type: "ALIVE", asked: 1, cookie: NO_ID, public: "198.18.0.1:53" },
    { type: "USERS", asked: 0, page: 3, last: 5, more: 1, total: 9, users },
    { type: "INTRODUCTION", peer: { ...other, name: "nobody", candidates: [] } },
    {
      type: "P2PSOMEONEWANTTOCALLYOU",
      peer: { ...other, name: "carol", candidates: ["127.0.0.1:9", "0.0.0.0:1", "10.0.0.1:7"] },
      body: world.bytes(40),
    },
    {
      type: "P2PSOMEONEWANTTOCALLYOU",
      peer: { ...other, name: "alice", candidates: ["198.18.0.1:53"] },
      body: world.bytes(40),
    },
    { type: "KEEPALIVE", cookie: NO_ID, rttMs: 1, nat: UNKNOWN, local: [] },
    { type: "INTRODUCTION", peer: { ...other, candidates: ["198.18.0.1:53", "[2001:db8::1]:1", "169.254.1.1:5"] } },
    { type: "LOGOUT" },
  ];
  for (const lie of lies) {
    talk(world, alice, bob, { count: 1 });
    tell("alice", lie);
    tell("bob", lie);
    world.net.run(500);
    tell("alice", lie, "198.18.0.1:2280");
    world.net.run(3_000);
  }
  talk(world, alice, bob, { count: 20 });
});
world("evil server: the keys that it names change, and change back", { server: { keys: EVIL } }, (world) => {
  const { tell } = evil(world, EVIL), [alice, bob] = pair(world);
  alice.command({ command: "verify", peer: "bob" });
  alice.command({ command: "getu", prefix: "" });
  world.net.run(1_000);
  talk(world, alice, bob);
  for (let i = 0; i < 3; i++) {
    const key = i === 1 ? alice.client && world.bytes(32) : keysFrom(world.bytes(32)).public;
    const peer = {
      name: "bob",
      nonce: hex(world.bytes(8)),
      key,
      candidates: ["198.18.0.1:53"],
      nat: UNKNOWN,
      punchAfterMs: 9,
    };
    tell("alice", { type: "INTRODUCTION", peer });
    world.net.run(100);
    tell("alice", {
      type: "USERS",
      asked: 0,
      page: 0,
      last: 0,
      more: 0,
      total: 2,
      users: [{ ...peer, public: "198.18.0.1:53" }],
    });
    talk(world, alice, bob, { count: 3 });
    alice.command({ command: "verify", peer: "bob" });
    world.net.run(5_000);
  }
  world.restartServer();
  talk(world, alice, bob, { count: 20 });
});
world("evil server: keys that are none, or one's own", { server: { keys: EVIL } }, (world) => {
  const { tell } = evil(world, EVIL), [alice, bob] = pair(world);
  const { nonce, key } = crowdOf(world).get("alice")!, nowhere = { nat: UNKNOWN, punchAfterMs: 0, candidates: [] };
  tell("alice", { type: "INTRODUCTION", peer: { ...nowhere, name: "bob", nonce, key } });
  talk(world, alice, bob);
  tell("alice", { type: "INTRODUCTION", peer: { ...nowhere, name: "bob", nonce: hex(world.bytes(8)), key } });
  talk(world, alice, bob);
  tell("alice", { type: "INTRODUCTION", peer: { ...nowhere, name: "bob", nonce: NO_ID, key: new Uint8Array(32) } });
  world.net.run(100);
  alice.send("bob", "to nobody's key");
  world.net.run(500);
  talk(world, alice, bob, { count: 20 });
  const untap = world.net.tap(({ host, from, data }) => {
    const asked = decode(data);
    if (host !== "alice" || asked?.type !== "KEEPALIVE") return;
    const cookie = {
      type: "COOKIE",
      cookie: NO_ID,
      key: new Uint8Array(32),
      terms: { version: VERSION, flag: false },
    } as const;
    world.net.inject({
      from: SERVER,
      to: from,
      data: encode(cookie, { id: asked.id, counter: asked.counter, key: undefined }),
    });
    return "drop";
  });
  world.net.run(15_000);
  untap();
  talk(world, alice, bob, { count: 20 });
});
world("forger: answers in the place of the server and of the peer", {}, (world) => {
  let welcomes = 0;
  world.net.tap(({ host, from, data }) => {
    const message = host ? decode(data) : null;
    if (message?.type === "WELCOME" && welcomes++ < 2) data[30]! ^= 1; // tampers with the datagram itself
    const first = message?.type === "P2PTRANS" ? decodeHandshake(message.body) : null;
    if (first?.type !== "P2PFIRST") return;
    const second = {
      type: "P2PSECOND",
      to: first.from,
      from: 1,
      noise: world.bytes(56),
      sealed: world.bytes(30),
    } as const;
    world.net.inject({ from: SERVER, to: from, data: encodeHandshake(second) });
  });
  const [alice, bob] = pair(world);
  talk(world, alice, bob);
});
world("evil server: introduces a hundred times a second", { server: { keys: EVIL } }, (world) => {
  const { tell } = evil(world, EVIL), [alice, bob] = pair(world);
  talk(world, alice, bob, { count: 1 });
  const { nonce, key } = world.machine && crowdOf(world).get("bob")!;
  const candidates = Array.from({ length: 8 }, (_, i) => `198.18.0.1:${1_000 + i}`);
  for (let i = 0; i < 300; i++) {
    const nat = { mapping: i % 2 ? "APDM" : "EIM", filtering: "APDF", allocation: "random" } as const;
    tell("alice", { type: "INTRODUCTION", peer: { name: "bob", nonce, key, candidates, nat, punchAfterMs: i % 150 } });
    world.net.run(10);
  }
  world.net.run(20_000);
  talk(world, alice, bob);
});
world("evil server: more users than a client remembers", { server: { keys: EVIL } }, (world) => {
  const { tell } = evil(world, EVIL), [alice, bob] = pair(world);
  crowd(world, ["user-1"]);
  alice.send("user-1", "hi");
  for (let i = 0; i < 20_010; i += 15) {
    const users = Array.from({ length: 15 }, (_, j) => `user-${i + j}`).map((name, j) => ({
      ...{ name, nonce: hex(world.bytes(8)), key: LOGIN.key, public: `198.18.0.1:${j + 1}` },
    }));
    tell("alice", { type: "USERS", asked: 0, page: 0, last: 0, more: 0, total: 9, users });
    if (i % 1_500 === 0) world.net.run(20);
  }
  for (const to of ["user-1", "user-2", "user-20000"]) alice.send(to, "hi");
  talk(world, alice, bob);
});
/** Who is there, as a newcomer hears it. */
const crowdOf = (world: World) => rogue(world, "spy", "198.18.77.7:7").people;
world("evil server: cookies without end, refusals without reason", { server: { keys: EVIL } }, (world) => {
  const { tell, logins } = evil(world, EVIL);
  let asked = 0;
  const untap = world.net.tap(({ data, from, host }) => {
    const message = decode(data);
    if (message?.type !== "LOGIN" || host === "" || isServers(from)) return;
    const { id, counter } = message, shared = diffieHellman(EVIL.secret, message.key)!;
    const answer: ControlBody = ++asked % 2
      ? { type: "COOKIE", cookie: hex(world.bytes(8)), key: EVIL.public, terms: { version: VERSION, flag: false } }
      : { type: "ERROR", reason: ["name-taken", "full", "because"][asked % 3]!, about: "x", seconds: 9 };
    const isRefusal = answer.type === "ERROR" && asked > 7;
    const seal = { id, counter, key: isRefusal ? loginKey(shared, id) : undefined };
    world.net.inject({ from: SERVER, to: from, data: encode(answer, seal) });
    return "drop";
  });
  const alice = join(world, "alice"), bob = join(world, "bob", { patient: true });
  world.net.run(9_000);
  untap();
  world.net.run(10_000);
  const [carol, dave] = ["carol", "dave"].map((name) => join(world, name)) as [Player, Player];
  login(world, carol, dave);
  talk(world, carol, dave);
  for (let i = 0; i < 12; i++) {
    tell("carol", {
      type: "COOKIE",
      cookie: hex(world.bytes(8)),
      key: EVIL.public,
      terms: { version: VERSION, flag: i % 3 !== 0 },
    });
    world.net.run(50);
  }
  const key = new Uint8Array(32); // no key: every secret shared with it is 0
  tell("carol", { type: "COOKIE", cookie: NO_ID, key, terms: { version: VERSION, flag: false } });
  world.net.run(60_000);
  talk(world, carol, dave);
  for (const player of [alice, bob]) player.send("carol", `${logins.size} logins`);
  world.net.run(20_000);
});
