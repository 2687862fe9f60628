/**
 * What the tests on real sockets share: sockets without any machine, helpers in processes of their own, and sessions
 * that a real client has opened and that are then spoken by hand. Loopback only. Linux has all of 127.0.0.0/8, so that
 * every prefix in it can be somebody else's network.
 *
 * @module
 */
import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { dirname } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { setImmediate } from "node:timers";
import { fileURLToPath } from "node:url";
import { createClient } from "../client.ts";
import { clock, type Control, type ControlBody, controlHeader, controlKeys, decode, encode } from "../protocol.ts";
import { diffieHellman, type Effect, generateKeys, MAGIC, publicNonce } from "../protocol.ts";

/** Where all servers are. */
export const HOST = "127.0.0.1";

export const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

export const percentile = (values: number[], share: number) =>
  values.toSorted((a, b) => a - b)[Math.min(values.length - 1, Math.floor(values.length * share))] ?? NaN;

/** For a table on the console. */
export const show = (values: number[]) => ({
  "p50 ms": Number(percentile(values, 0.5).toFixed(2)),
  "p95 ms": Number(percentile(values, 0.95).toFixed(2)),
  "max ms": Number(Math.max(...values).toFixed(1)),
});

// ---------------------------------------------------------------------------------------------------- bare sockets

export interface Socket {
  port: number;
  send(data: Uint8Array, port: number): void | Promise<unknown>; // to a port of HOST
  deafen(): void; // from now on the kernel throws away what comes in (Bun still reads it)
  close(): void;
}

/** The shortest loop that the runtime has; without a handler what comes in is left to the kernel, where that goes. */
export async function bare(
  onData?: (data: Uint8Array, port: number) => void | Promise<unknown>,
  hostname = HOST,
): Promise<Socket> {
  let hears = onData !== undefined;
  if (!("Deno" in globalThis)) {
    const socket = await Bun.udpSocket({
      hostname,
      port: 0,
      socket: { data: (_socket, data, port) => hears ? void onData!(data, port) : undefined, error() {} },
    });
    return {
      port: socket.port,
      send: (data, port) => void socket.send(data, port, HOST),
      deafen: () => void (hears = false),
      close: () => socket.close(),
    };
  }
  const socket = Deno.listenDatagram({ transport: "udp", hostname, port: 0 });
  if (onData) {
    (async () => {
      const buffer = new Uint8Array(2_048);
      while (hears) {
        const [data, from] = await socket.receive(buffer);
        if (hears) await onData(data, (from as Deno.NetAddr).port);
      }
    })().catch(() => {});
  }
  return {
    port: (socket.addr as Deno.NetAddr).port,
    send: (data, port) => socket.send(data, { transport: "udp", hostname: HOST, port }),
    deafen: () => void (hears = false),
    close: () => socket.close(),
  };
}

// ---------------------------------------------------------------------------------------------------- helpers

/** In a helper: the role that it was hired for. */
export const ROLE = process.env["PUNCH_ROLE"];
/** Of any helper, should the test die. */
const ROLE_LIMIT_MS = 600_000;

const helpers = new Set<ChildProcess>();
process.on("exit", () => {
  for (const helper of helpers) helper.kill("SIGKILL");
});

/** A process that answers each order with one line of JSON, in order. */
export interface Helper<Order, Answer> {
  ask(order: Order): Promise<Answer>;
  end(): void;
}

/** Starts a test's file as a helper in some role. */
export function hire<Order, Answer>(file: string, role: string): Helper<Order, Answer> {
  const self = fileURLToPath(file);
  const child = spawn(process.execPath, "Deno" in globalThis ? ["run", "-A", "--no-check", self] : [self], {
    cwd: dirname(dirname(dirname(self))),
    env: { ...process.env, PUNCH_ROLE: role, DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1" },
    stdio: ["pipe", "pipe", "inherit"],
  });
  const waiting: { resolve(answer: Answer): void; reject(error: Error): void }[] = [];
  helpers.add(child);
  child.stdin!.on("error", () => {});
  createInterface({ input: child.stdout! }).on("line", (line) => waiting.shift()?.resolve(JSON.parse(line)));
  child.on("close", () => {
    helpers.delete(child);
    for (const { reject } of waiting.splice(0)) reject(new Error(`The ${role} ended without an answer`));
  });
  return {
    ask(order) {
      child.stdin!.write(`${JSON.stringify(order)}\n`);
      return new Promise((resolve, reject) => void waiting.push({ resolve, reject }));
    },
    end: () => void child.kill("SIGKILL"),
  };
}

/** In a helper: carries out orders, one after the other, until the test ends. */
export async function serve<Order, Answer>(carryOut: (order: Order) => Answer | Promise<Answer>): Promise<never> {
  setTimeout(() => process.exit(1), ROLE_LIMIT_MS);
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await carryOut(JSON.parse(line))));
  }
  process.exit(0);
}

/**
 * Sends evenly, `rate` datagrams a second in all. What is overdue is not made up for in one burst that no socket's
 * buffer would hold, and the pause is no timer, which would come late and bunch what is to be even.
 */
export async function sendEvenly(
  { rate, ms }: { rate: number; ms: number },
  next: (count: number) => void | Promise<unknown>,
): Promise<number> {
  const pause = new Int32Array(new SharedArrayBuffer(4)), begun = performance.now();
  let sent = 0;
  for (let at = begun; at < begun + ms; at = performance.now()) {
    for (let due = Math.min(64, (at - begun) / 1_000 * rate - sent); due > 0; due--, sent++) await next(sent);
    Atomics.wait(pause, 0, 0, 0.15);
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
  return Math.round(sent / (performance.now() - begun) * 1_000);
}

/** What comes back from a bare echo that so many ask in turn, each every so many ms: the latencies. */
export async function knockAt(
  port: number,
  { askers, bytes, everyMs, ms }: { askers: number; bytes: number; everyMs: number; ms: number },
): Promise<number[]> {
  const latencies: number[] = [];
  const take = (data: Uint8Array) =>
    void latencies.push(clock() - new DataView(data.buffer, data.byteOffset).getFloat64(0));
  const sockets = await Promise.all(Array.from({ length: askers }, () => bare(take)));
  const begun = clock();
  for (let i = 0; i * everyMs < ms * askers; i++) {
    const due = begun + i * everyMs / askers;
    if (due > clock()) await sleep(due - clock());
    const data = new Uint8Array(bytes);
    new DataView(data.buffer).setFloat64(0, clock());
    await sockets[i % askers]!.send(data, port);
  }
  await sleep(100);
  for (const socket of sockets) socket.close();
  return latencies;
}

// ---------------------------------------------------------------------------------------------------- logins by hand

const random = (length: number) => Uint8Array.from(randomBytes(length));

/** What a real client says to a server while it logs in: one socket, no timers of its own. */
export function newClient(name: string, port: number) {
  const keys = generateKeys();
  const client = createClient({ name, keys, servers: [`${HOST}:${port}`], random, generateKeys, direct: false });
  return { keys, client };
}

/** A session of an ordinary client, which from now on says what we want. */
export interface Session {
  name: string;
  nonce: string; // by which others know its login
  socket: Socket;
  seal(message: ControlBody): Uint8Array;
}

/**
 * Lets a real client log in and takes its session over. What is needed for that is read off what it hears, so that no
 * field of a login is written here; only what makes the keys must be as in server.ts and client.ts.
 */
export async function logIn(name: string, { port, from }: { port: number; from: string }): Promise<Session> {
  const { keys, client } = newClient(name, port), server = `${HOST}:${port}`;
  let counter = 0, shared: Uint8Array | null = null, welcome: (Control & { type: "WELCOME" }) | undefined;
  let isIn = (_seal: Session["seal"]) => {};
  const entered = new Promise<Session["seal"]>((resolve) => isIn = resolve);
  const perform = (effects: Effect<{ event: string }>[]) => {
    for (const effect of effects) {
      if (effect.kind === "event" && effect.event.event === "login") {
        const { toServer } = controlKeys(shared!, welcome!.token), id = welcome!.token;
        isIn((message) => encode(message, { id, counter: ++counter, key: toServer }));
      }
      if (effect.kind !== "send" || effect.socket !== 0) continue;
      if (effect.data[0] === MAGIC) counter = Math.max(counter, controlHeader(effect.data)?.counter ?? 0);
      socket.send(effect.data, port);
    }
  };
  const socket: Socket = await bare((data) => {
    const message = decode(data);
    if (message?.type === "COOKIE") shared = diffieHellman(keys.secret, message.key);
    if (message?.type === "WELCOME") welcome = message;
    perform(client.receive({ socket: 0, from: server, data }, clock()));
  }, from);
  perform(client.opened(0, socket.port, clock()));
  const timer = setInterval(() => clock() >= client.wakeAt() && perform(client.wake(clock())), 50);
  const seal = await entered;
  clearInterval(timer);
  socket.deafen();
  return { name, nonce: publicNonce(welcome!.id), socket, seal };
}
