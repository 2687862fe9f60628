/**
 * What the seals, the cookies and the machines cost: each row is a rate, and what part that is of the same work done
 * bare by the same runtime, in the same run. Rows that are compared are measured by turns, so that a machine that has
 * other things to do slows both; what is printed are medians.
 *
 *     this file: window of 64 datagrams ----> echo loop of the runtime, or server.ts, in a process of its own
 *                 count the answers     <----
 *
 *     deno task bench      or      bun lab/bench.ts
 *
 * @module
 */
import { type ChildProcess, spawn } from "node:child_process";
import {
  createCipheriv,
  createDecipheriv,
  diffieHellman as x25519,
  generateKeyPairSync,
  randomBytes,
} from "node:crypto";
import { readFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import {
  CONTROL,
  type Control,
  type ControlBody,
  controlKeys,
  decode,
  diffieHellman,
  encode,
  formatEndpoint,
  generateKeys,
  initiate,
  loginKey,
  openPeer,
  publicNonce,
  respond,
  sealPeer,
} from "../protocol.ts";
import { VERSION } from "../protocol.ts";
import { createServer } from "../server.ts";

/** Datagrams on their way at a time: enough to keep both ends busy, few enough for any socket buffer. */
const WINDOW = 64;
const ECHO_BYTES = 60;
const ROUNDS = 5;
const ROUND_MS = 300, WORK_MS = 100;
/** Until the runtime has compiled what is hot. */
const WARM_UP_MS = 400;
/** No answer for so long: the window was lost (the kernel drops what a socket buffer cannot take), send another. */
const LOST_MS = 50;
/** So many sessions say something in turn, from so many addresses, since the server limits each, and each /24. */
const TALKERS = 256, HOSTS = 8;
const RELAYED_BYTES = 60;

const isDeno = "Deno" in globalThis;
const SELF = fileURLToPath(import.meta.url);
const SERVER = fileURLToPath(new URL("../server.ts", import.meta.url).href);
const NO_ID = "0".repeat(16);
const random = (length: number) => Uint8Array.from(randomBytes(length));
const median = (values: number[]) => values.toSorted((one, other) => one - other)[values.length >> 1]!;

// ---------------------------------------------------------------------------------------------------- bare sockets

interface Socket {
  port: number;
  send(data: Uint8Array, port: number): void;
  close(): void;
}

/** The shortest way from a datagram to a function and back, in either runtime: what everything is compared with. */
async function bareSocket(
  onData: (data: Uint8Array, port: number) => void,
  hostname = "127.0.0.1",
): Promise<Socket> {
  if (!isDeno) {
    const socket = await Bun.udpSocket({
      hostname,
      socket: { data: (_socket, data, port) => onData(data, port), error() {} },
    });
    return {
      port: socket.port,
      send: (data, port) => void socket.send(data, port, "127.0.0.1"),
      close: () => socket.close(),
    };
  }
  const socket = Deno.listenDatagram({ transport: "udp", hostname, port: 0 });
  (async () => {
    const buffer = new Uint8Array(2048);
    try {
      while (true) {
        const [data, from] = await socket.receive(buffer);
        onData(data, (from as Deno.NetAddr).port);
      }
    } catch { /* closed */ }
  })();
  return {
    port: (socket.addr as Deno.NetAddr).port,
    send: (data, port) => void socket.send(data, { transport: "udp", hostname: "127.0.0.1", port }).catch(() => {}),
    close: () => socket.close(),
  };
}

/** The process that the others are compared with. */
async function echo(): Promise<void> {
  const socket = await bareSocket((data, port) => socket.send(isDeno ? data.slice() : data, port));
  console.log(JSON.stringify({ port: socket.port }));
  process.stdin.resume().on("end", () => process.exit());
}

const children = new Set<ChildProcess>();

/** Starts a program of the same runtime; its port is on the first line it prints. */
async function launch(file: string, ...args: string[]): Promise<{ pid: number; port: number }> {
  const child = spawn(process.execPath, [...isDeno ? ["run", "-A"] : [], file, ...args], {
    env: { ...process.env, DENO_NO_UPDATE_CHECK: "1" },
    stdio: ["pipe", "pipe", "inherit"],
  });
  children.add(child);
  const line = await new Promise<string>((resolve, reject) => {
    child.stdout!.setEncoding("utf8").once("data", resolve);
    child.once("exit", (code) => reject(new Error(`${file} ended with ${code}`)));
  });
  child.stdout!.resume();
  return { pid: child.pid!, port: JSON.parse(line.split("\n")[0]!).port };
}

/** Processor time that a process has used, in us; NaN where there is no /proc. */
function processorTime(pid: number): number {
  try {
    const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]!.split(" ");
    return (Number(fields[11]) + Number(fields[12])) * 10_000; // ticks of 10 ms, on every Linux
  } catch {
    return NaN;
  }
}

interface Load {
  label: string;
  pid: number;
  port: number;
  next: () => Uint8Array; // the next datagram to send
  by?: () => Socket; // whose turn that was, if not the common one's
  prepare?: (count: number) => void; // made beforehand, so that only sending is measured
  rates: number[];
  costs: number[]; // us of the other process's processor for each answer
}

/** Keeps a window of datagrams on their way for a while; how many answers came, and what they cost. */
async function blast(socket: Socket, load: Load, ms: number): Promise<void> {
  load.prepare?.(Math.ceil(1.5 * (load.rates.at(-1) ?? 50_000) * ms / 1000));
  const began = performance.now(), processor = processorTime(load.pid);
  let answers = 0, seen = 0;
  const send = () => {
    const data = load.next(); // this chooses who
    (load.by?.() ?? socket).send(data, load.port);
  };
  receive = () => {
    answers++;
    send();
  };
  for (let i = 0; i < WINDOW; i++) send();
  await new Promise<void>((resolve) => {
    const timer = setInterval(() => {
      if (performance.now() - began >= ms) {
        clearInterval(timer);
        return resolve();
      }
      if (answers === seen) { for (let i = 0; i < WINDOW; i++) send(); }
      seen = answers;
    }, LOST_MS);
  });
  receive = () => {};
  load.rates.push(answers / (performance.now() - began) * 1000);
  load.costs.push((processorTime(load.pid) - processor) / answers);
  await new Promise((resolve) => setTimeout(resolve, LOST_MS)); // let what is under way arrive
}

let receive: (data: Uint8Array) => void = () => {};

// ---------------------------------------------------------------------------------------------------- the real server

const loginOf = (name: string, key: Uint8Array, cookie = NO_ID): ControlBody => (
  {
    type: "LOGIN",
    cookie,
    key,
    proof: NO_ID,
    terms: { version: VERSION, flag: false },
    direct: 1,
    rttMs: 0,
    name,
    local: [],
  }
);
const NAT = { mapping: "EIM", filtering: "EIF", allocation: "preserving" } as const;
const KEEPALIVE: ControlBody & { type: "KEEPALIVE" } = {
  type: "KEEPALIVE",
  cookie: NO_ID,
  rttMs: 20,
  nat: NAT,
  local: [],
};

/** A session of ours with the server, as far as the server can tell. */
interface Session {
  token: string;
  nonce: string; // as others know this login; of the first of us, who is on the first page of users
  counter: number;
  toServer: Uint8Array;
}

/** Logs in as the client does. */
async function logIn(socket: Socket, port: number, name: string): Promise<Session> {
  const keys = generateKeys(), id = randomBytes(8).toString("hex"), counter = Math.floor(Date.now());
  const ask = (data: Uint8Array, type: Control["type"]) =>
    new Promise<Control>((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error(`The server does not answer with ${type}`)), 2_000);
      receive = (data) => {
        const message = decode(data);
        if (message?.type !== type) return;
        clearTimeout(timer);
        resolve(message);
      };
      socket.send(data, port);
    });
  const asked = await ask(encode(loginOf(name, keys.public), { id, counter }), "COOKIE");
  const { cookie, key } = asked as Control & { type: "COOKIE" };
  const shared = diffieHellman(keys.secret, key)!;
  const login = encode(loginOf(name, keys.public, cookie), { id, counter, key: loginKey(shared, id) });
  const answer = await ask(login, "WELCOME");
  const { token, users } = answer as Control & { type: "WELCOME" };
  const nonce = users.find((user) => user.name === name)?.nonce ?? publicNonce(id);
  return { token, nonce, counter, toServer: controlKeys(shared, token).toServer };
}

async function overSockets(): Promise<Load[]> {
  const [bare, server] = await Promise.all([
    launch(SELF, "--echo"),
    launch(SERVER, "--host", "127.0.0.1", "--port", "0", "--alt-port", "0", "--json"),
  ]);
  const socket = await bareSocket((data) => receive(data));
  const hosts: { socket: Socket; prover: Session }[] = [], talkers: (Session & { by: Socket })[] = [];
  for (let i = 0; i < HOSTS; i++) {
    const by: Socket = await bareSocket((data) => {
      const message = data[1] === CONTROL.COOKIE.code ? decode(data) : null;
      if (message?.type !== "COOKIE" || !message.terms.flag) return receive(data);
      const { token: id, toServer: key } = prover; // the server wants to know whether this host still receives
      by.send(encode({ ...KEEPALIVE, cookie: message.cookie }, { id, counter: ++prover.counter, key }), server.port);
    }, `127.0.${20 + i}.1`);
    const prover = await logIn(by, server.port, `prover${i}`);
    hosts.push({ socket: by, prover });
  }
  for (let i = 0; i < TALKERS; i++) {
    const by = hosts[i % HOSTS]!.socket;
    talkers.push({ ...await logIn(by, server.port, `talker${i}`), by });
  }

  /** Datagrams with counters of their own, made before the clock runs. */
  const fresh = (make: (session: Session, counter: number) => Uint8Array) => {
    let stock: [Uint8Array, Socket][] = [], at = 0, turn = 0, by = socket;
    const one = (): [Uint8Array, Socket] => {
      const session = talkers[turn++ % TALKERS]!;
      return [make(session, ++session.counter), session.by];
    };
    return {
      prepare: (count: number) => void (stock = Array.from({ length: count }, one), at = 0),
      next() {
        const [data, socket] = stock[at++] ?? one();
        by = socket;
        return data;
      },
      by: () => by,
    };
  };
  const seal = ({ token, toServer }: Session, counter: number) => ({ id: token, counter, key: toServer });
  const body = random(RELAYED_BYTES);
  /** Two of one host talk to each other, and know each other. */
  const trans = (session: Session): ControlBody => {
    const i = talkers.indexOf(session as typeof talkers[number]), other = i ^ HOSTS;
    return { type: "P2PTRANS", to: `talker${other}`, nonce: talkers[other]!.nonce, call: 2, body };
  };
  const stranger = encode(loginOf("stranger", random(32)), { id: NO_ID, counter: 1 });
  const constant = (data: Uint8Array) => ({ next: () => data });
  const loads: Load[] = [
    { label: `bare UDP echo, ${ECHO_BYTES} bytes`, ...bare, ...constant(random(ECHO_BYTES)) },
    { label: "COOKIE to a stranger: the server limits it", ...server, ...constant(stranger) },
    { label: "KEEPALIVE -> ALIVE", ...server, ...fresh((s, counter) => encode(KEEPALIVE, seal(s, counter))) },
    { label: "P2PTRANS -> RELAYED", ...server, ...fresh((s, counter) => encode(trans(s), seal(s, counter))) },
  ].map((load) => ({ ...load, rates: [], costs: [] }));
  for (let round = 0; round <= ROUNDS; round++) {
    for (const load of loads) await blast(socket, load, round === 0 ? WARM_UP_MS : ROUND_MS);
  }
  for (const { socket: by } of [...hosts, { socket }]) by.close();
  for (const load of loads) load.rates.shift(), load.costs.shift();
  return loads;
}

// ---------------------------------------------------------------------------------------------------- without sockets

interface Work {
  label: string;
  once: () => void; // does it once
  bare?: string; // what it is compared with
  parts?: number; // how many of those it contains at least
  rates: number[];
}

function measure(works: Work[]): void {
  const run = (work: Work, ms: number) => {
    const began = performance.now();
    let count = 0, now = began;
    for (; now - began < ms; now = performance.now()) for (let i = 0; i < 10; i++, count++) work.once();
    return count / (now - began) * 1000;
  };
  for (const work of works) run(work, WORK_MS);
  for (let round = 0; round < ROUNDS; round++) for (const work of works) work.rates.push(run(work, WORK_MS));
}

/** Sealed datagrams of a chat message of so many bytes, beside AES-256-GCM of as many. */
function seals(bytes: number): Work[] {
  const key = random(32), iv = random(12), ad = random(12), text = random(bytes + 10); // seq, base and left
  const message = { type: "P2PMESSAGE", seq: 1, base: 1, left: 0, part: random(bytes) } as const;
  const encrypt = () => {
    const cipher = createCipheriv("aes-256-gcm", key, iv);
    cipher.setAAD(ad);
    return { sealed: [cipher.update(text), cipher.final()], tag: cipher.getAuthTag() };
  };
  const { sealed, tag } = encrypt();
  const data = sealPeer(message, { index: 1, counter: 1, key });
  let counter = 1;
  return [
    { label: `bare aes-256-gcm, ${bytes} bytes`, once: () => void encrypt(), rates: [] },
    {
      label: `sealPeer, ${bytes} bytes`,
      bare: `bare aes-256-gcm, ${bytes} bytes`,
      rates: [],
      once: () => void sealPeer(message, { index: 1, counter: ++counter, key }),
    },
    {
      label: `bare opening, ${bytes} bytes`,
      rates: [],
      once() {
        const cipher = createDecipheriv("aes-256-gcm", key, iv, { authTagLength: 16 });
        cipher.setAAD(ad);
        cipher.setAuthTag(tag);
        cipher.update(sealed[0]!);
        cipher.final();
      },
    },
    {
      label: `openPeer, ${bytes} bytes`,
      bare: `bare opening, ${bytes} bytes`,
      rates: [],
      once: () => void openPeer(data, key),
    },
  ];
}

const DH = "bare X25519";
/** Of Noise KK: es, ss, ee and se, on both sides. */
const DH_OF_HANDSHAKE = 8;

function handshakes(): Work[] {
  const { privateKey } = generateKeyPairSync("x25519"), { publicKey } = generateKeyPairSync("x25519");
  const alice = generateKeys(), bob = generateKeys();
  const psk = new Uint8Array(32), prologue = random(32), payload = random(100);
  return [
    { label: DH, once: () => void x25519({ privateKey, publicKey }), rates: [] },
    {
      label: `handshake (${DH_OF_HANDSHAKE} DH)`,
      bare: DH,
      parts: DH_OF_HANDSHAKE,
      rates: [],
      once() {
        const a = { own: alice, peer: bob.public, psk, prologue, ephemeral: generateKeys() };
        const b = { own: bob, peer: alice.public, psk, prologue, ephemeral: generateKeys() };
        const begun = initiate(a, payload)!;
        const { message } = respond(b, begun.message)!.answer(payload);
        if (!begun.finish(message)) throw new Error("The handshake fails");
      },
    },
  ];
}

/** The server's side of a login, from the first LOGIN to WELCOME; the clients' side is made beforehand. */
function logins(): Work {
  const keys = generateKeys(), cookieKey = random(16), now = Date.now();
  const empty = () => createServer({ keys, random: (length) => length === 16 ? cookieKey : random(length) });
  let server = empty(), at = 0;
  const clients = Array.from({ length: 2_000 }, (_, i) => {
    const own = generateKeys(), id = randomBytes(8).toString("hex"), name = `user${i}`;
    const from = formatEndpoint(`198.51.${i >> 8}.${i & 255}`, 40_000);
    const first = encode(loginOf(name, own.public), { id, counter: now });
    const asked = server.receive({ socket: 0, from, data: first }, now)[0] as { data: Uint8Array };
    const { cookie } = decode(asked.data) as Control & { type: "COOKIE" };
    const key = loginKey(diffieHellman(own.secret, keys.public)!, id);
    return { from, first, second: encode(loginOf(name, own.public, cookie), { id, counter: now, key }) };
  });
  return {
    label: "login at the server (1 DH)",
    bare: DH,
    rates: [],
    once() {
      if (at === clients.length) server = empty(), at = 0; // with the same cookies
      const { from, first, second } = clients[at++]!;
      server.receive({ socket: 0, from, data: first }, now);
      if (server.receive({ socket: 0, from, data: second }, now).length < 2) throw new Error("A login fails");
    },
  };
}

// ---------------------------------------------------------------------------------------------------- the table

const count = (rate: number) => rate.toFixed(0).replace(/\B(?=(\d{3})+$)/g, ",");

function print(...rows: string[][]): void {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  for (const row of rows) {
    const cells = row.map((cell, i) => i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!));
    console.log(cells.join("   ").trimEnd());
  }
  console.log();
}

/** The median of the ratios round by round: what one round was slowed by, its bare work was too. */
function ratio(values: number[], bare: number[]): string {
  const all = values.map((value, round) => value / bare[round]!);
  return all.some(Number.isNaN) ? "" : median(all).toFixed(2);
}

function printLoads(loads: Load[]): void {
  const bare = loads[0]!;
  const rows = loads.map(({ label, rates, costs }) => [
    label,
    count(median(rates)),
    ratio(rates, bare.rates),
    ...Number.isNaN(costs[0]!) ? ["", ""] : [median(costs).toFixed(1), ratio(costs, bare.costs)],
  ]);
  print([`window of ${WINDOW}, loopback`, "answers/s", "of bare", "us of processor", "of bare"], ...rows);
}

function printWorks(title: string, works: Work[]): void {
  const rows = works.map(({ label, rates, bare, parts = 1 }) => {
    const base = works.find((work) => work.label === bare) ?? works.find((work) => work.rates === rates)!;
    return [label, count(median(rates)), ratio(rates.map((rate) => rate * parts), base.rates)];
  });
  print([title, "per second", "of bare"], ...rows);
}

async function main(): Promise<void> {
  console.log(`${isDeno ? `Deno ${Deno.version.deno}` : `Bun ${Bun.version}`}\n`);
  try {
    printLoads(await overSockets());
    const sealed = [...seals(44), ...seals(800)];
    measure(sealed);
    printWorks("seals, no sockets", sealed);
    const agreed = [...handshakes(), logins()];
    measure(agreed);
    printWorks("keys, no sockets", agreed);
  } finally {
    for (const child of children) if (child.exitCode === null) child.kill("SIGKILL");
  }
}

if (import.meta.main) {
  if (process.argv[2] === "--echo") await echo();
  else await main().then(() => process.exit(0));
}
