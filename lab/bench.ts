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
import { createCipheriv, createDecipheriv, diffieHellman, generateKeyPairSync, randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import {
  agree,
  type Control,
  controlKeys,
  decode,
  encode,
  formatEndpoint,
  generateKeys,
  initiate,
  loginKey,
  openPeer,
  respond,
  sealPeer,
} from "../protocol.ts";
import { createServer } from "../server.ts";

/** Datagrams on their way at a time: enough to keep both ends busy, few enough for any socket buffer. */
const WINDOW = 64;
const ECHO_BYTES = 60;
const ROUNDS = 5;
const ROUND_MS = 500;
/** Until the runtime has compiled what is hot. */
const WARM_UP_MS = 500;
/** No answer for so long: the window was lost (the kernel drops what a socket buffer cannot take), send another. */
const LOST_MS = 50;
/** So many sessions say something in turn, since the server lets each relay 512 KiB at once and 256 KiB a second. */
const TALKERS = 64;
const RELAYED_BYTES = 60;

const isDeno = "Deno" in globalThis;
const SELF = fileURLToPath(import.meta.url);
const SERVER = fileURLToPath(new URL("../server.ts", import.meta.url));
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
async function bareSocket(onData: (data: Uint8Array, port: number) => void): Promise<Socket> {
  if (!isDeno) {
    const socket = await Bun.udpSocket({
      hostname: "127.0.0.1",
      socket: { data: (_socket, data, port) => onData(data, port), error() {} },
    });
    return {
      port: socket.port,
      send: (data, port) => void socket.send(data, port, "127.0.0.1"),
      close: () => socket.close(),
    };
  }
  const socket = Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 });
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
  /** The next datagram to send. */
  next: () => Uint8Array;
  /** Made beforehand, so that only sending is measured. */
  prepare?: (count: number) => void;
  rates: number[];
  /** us of the other process's processor for each answer. */
  costs: number[];
}

/** Keeps a window of datagrams on their way for a while; how many answers came, and what they cost. */
async function blast(socket: Socket, load: Load, ms: number): Promise<void> {
  load.prepare?.(ms * 250);
  const began = performance.now(), processor = processorTime(load.pid);
  let answers = 0, seen = 0;
  receive = () => {
    answers++;
    socket.send(load.next(), load.port);
  };
  for (let i = 0; i < WINDOW; i++) socket.send(load.next(), load.port);
  await new Promise<void>((resolve) => {
    const timer = setInterval(() => {
      if (performance.now() - began >= ms) {
        clearInterval(timer);
        return resolve();
      }
      if (answers === seen) for (let i = 0; i < WINDOW; i++) socket.send(load.next(), load.port);
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

/** A session of ours with the server, as far as the server can tell. */
interface Session {
  token: string;
  nonce: string;
  counter: number;
  toServer: Uint8Array;
}

/** Logs in as the client does. */
async function logIn(socket: Socket, port: number, name: string): Promise<Session> {
  const keys = generateKeys(), id = randomBytes(8).toString("hex"), counter = Math.floor(Date.now());
  const login = { type: "LOGIN", key: keys.public, proof: NO_ID, keepName: 0, rttMs: 0, name, local: [] } as const;
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
  const asked = await ask(encode({ ...login, cookie: NO_ID }, { id, counter }), "COOKIE");
  const { cookie, key } = asked as Control & { type: "COOKIE" };
  const shared = agree(keys.secret, key)!;
  const answer = await ask(encode({ ...login, cookie }, { id, counter, key: loginKey(shared, id) }), "WELCOME");
  const { token, nonce } = answer as Control & { type: "WELCOME" };
  return { token, nonce, counter, toServer: controlKeys(shared, token).toServer };
}

async function overSockets(): Promise<Load[]> {
  const [bare, server] = await Promise.all([
    launch(SELF, "--echo"),
    launch(SERVER, "--host", "127.0.0.1", "--port", "0", "--alt-port", "0", "--json"),
  ]);
  const socket = await bareSocket((data) => receive(data));
  const talkers: Session[] = [];
  for (let i = 0; i < TALKERS; i++) talkers.push(await logIn(socket, server.port, `talker${i}`));

  /** Datagrams with counters of their own, made before the clock runs. */
  const fresh = (make: (session: Session, counter: number) => Uint8Array) => {
    let stock: Uint8Array[] = [], at = 0, turn = 0;
    const one = () => {
      const session = talkers[turn++ % TALKERS]!;
      return make(session, ++session.counter);
    };
    return {
      prepare: (count: number) => void (stock = Array.from({ length: count }, one), at = 0),
      next: () => stock[at++] ?? one(),
    };
  };
  const seal = ({ token, toServer }: Session, counter: number) => ({ id: token, counter, key: toServer });
  const keepalive = { type: "KEEPALIVE", cookie: NO_ID, rttMs: 20, local: [] } as const;
  const listener = talkers[0]!;
  const trans = { type: "P2PTRANS", to: "talker0", nonce: listener.nonce, call: 0, body: random(RELAYED_BYTES) } as const;
  const stranger = encode(
    { type: "LOGIN", cookie: NO_ID, key: random(32), proof: NO_ID, keepName: 0, rttMs: 0, name: "x", local: [] },
    { id: NO_ID, counter: 1 },
  );
  const constant = (data: Uint8Array) => ({ next: () => data });
  const loads: Load[] = [
    { label: `bare UDP echo, ${ECHO_BYTES} bytes`, ...bare, ...constant(random(ECHO_BYTES)) },
    { label: "COOKIE to a stranger's LOGIN", ...server, ...constant(stranger) },
    { label: "KEEPALIVE -> ALIVE", ...server, ...fresh((s, counter) => encode(keepalive, seal(s, counter))) },
    { label: "P2PTRANS -> RELAYED", ...server, ...fresh((s, counter) => encode(trans, seal(s, counter))) },
  ].map((load) => ({ ...load, rates: [], costs: [] }));
  for (const load of loads) await blast(socket, load, WARM_UP_MS);
  for (const load of loads) load.rates = [], load.costs = [];
  for (let round = 0; round < ROUNDS; round++) for (const load of loads) await blast(socket, load, ROUND_MS);
  socket.close();
  return loads;
}

// ---------------------------------------------------------------------------------------------------- without sockets

interface Work {
  label: string;
  /** Does it once. */
  once: () => void;
  /** What it is compared with, and how many of those it contains at least. */
  bare?: string;
  parts?: number;
  rates: number[];
}

function measure(works: Work[], roundMs: number): void {
  const run = (work: Work, ms: number) => {
    const began = performance.now();
    let count = 0, now = began;
    for (; now - began < ms; now = performance.now()) for (let i = 0; i < 10; i++, count++) work.once();
    return count / (now - began) * 1000;
  };
  for (const work of works) run(work, roundMs);
  for (let round = 0; round < ROUNDS; round++) for (const work of works) work.rates.push(run(work, roundMs));
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
  const rates: number[] = [];
  return [
    { label: `bare aes-256-gcm, ${bytes} bytes`, once: () => void encrypt() },
    {
      label: `sealPeer, ${bytes} bytes`,
      bare: `bare aes-256-gcm, ${bytes} bytes`,
      once: () => void sealPeer(message, { index: 1, counter: ++counter, key }),
    },
    {
      label: `bare opening, ${bytes} bytes`,
      once() {
        const cipher = createDecipheriv("aes-256-gcm", key, iv, { authTagLength: 16 });
        cipher.setAAD(ad);
        cipher.setAuthTag(tag);
        cipher.update(sealed[0]!);
        cipher.final();
      },
    },
    { label: `openPeer, ${bytes} bytes`, bare: `bare opening, ${bytes} bytes`, once: () => void openPeer(data, key) },
  ].map((work) => ({ ...work, rates: [...rates] }));
}

const DH = "bare X25519";
/** Of Noise KK: es, ss, ee and se, on both sides. */
const DH_OF_HANDSHAKE = 8;

function handshakes(): Work[] {
  const { privateKey } = generateKeyPairSync("x25519"), { publicKey } = generateKeyPairSync("x25519");
  const alice = generateKeys(), bob = generateKeys();
  const psk = new Uint8Array(32), prologue = random(32), payload = random(100);
  return [
    { label: DH, once: () => void diffieHellman({ privateKey, publicKey }), rates: [] },
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

/** The server's side of a login, LOGIN to WELCOME; the clients' sides are made beforehand. */
function logins(): Work {
  const keys = generateKeys(), now = Date.now();
  const server = createServer({ keys, random });
  const people = Array.from({ length: 4_000 }, (_, i) => {
    const own = generateKeys(), id = randomBytes(8).toString("hex"), name = `user${i}`;
    const from = formatEndpoint(`198.${51 + (i >> 16)}.${i >> 8 & 255}.${i & 255}`, 40_000);
    const login = { type: "LOGIN", key: own.public, proof: NO_ID, keepName: 0, rttMs: 0, name, local: [] } as const;
    const first = encode({ ...login, cookie: NO_ID }, { id, counter: now });
    const asked = server.receive({ socket: 0, from, data: first }, now)[0];
    const { cookie } = decode((asked as { data: Uint8Array }).data) as Control & { type: "COOKIE" };
    const key = loginKey(agree(own.secret, keys.public)!, id);
    return { from, first, second: encode({ ...login, cookie }, { id, counter: now, key }) };
  });
  let at = 0;
  return {
    label: "login at the server (1 DH)",
    bare: DH,
    rates: [],
    once() {
      const { from, first, second } = people[at++ % people.length]!;
      server.receive({ socket: 0, from, data: first }, now);
      server.receive({ socket: 0, from, data: second }, now);
    },
  };
}

// ---------------------------------------------------------------------------------------------------- the table

const table: string[][] = [];
const thousands = (rate: number) => rate.toFixed(0).replace(/\B(?=(\d{3})+$)/g, ",");
const ratio = (value: number) => Number.isFinite(value) ? value.toFixed(2) : "";

function print(heading: string[], rows: string[][]): void {
  table.push(heading, ...rows);
  const all = [heading, ...rows];
  const widths = heading.map((_, column) => Math.max(...all.map((row) => row[column]!.length)));
  const line = (row: string[]) =>
    row.map((cell, column) => column ? cell.padStart(widths[column]!) : cell.padEnd(widths[0]!)).join("   ").trimEnd();
  for (const row of all) console.log(line(row));
  console.log();
}
