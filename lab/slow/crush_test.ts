/**
 * One host against everybody, on real sockets: 400 ordinary sessions that all ask as much as they may, and strangers
 * who crowd at the door. Loopback only, where each 127.0.x.0/24 is somebody else's network; Linux alone has all of it.
 *
 *     127.0.9.1, 127.0.10.1, ...  one helper: 400 sessions, or 64 ports --->  server, 127.0.0.1
 *     127.0.5.1                   couples, a message each way every 100 ms <--->  (only over the relay)
 *     127.0.6.1                   newcomers, one every 35 ms ------------->
 *
 * All share the cores of one machine. So before something counts as too slow, calm and attacked are measured again, one
 * right after the other. For the couples so is a bare echo that suffers the same attack: as much slower as that becomes,
 * the server may become too.
 *
 * With PUNCH_ROLE this file is one of the helpers.
 *
 * @module
 */
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { setPriority } from "node:os";
import process from "node:process";
import { type ClientEvent, createClient } from "../../client.ts";
import { clock, type ControlBody, decode, encode, generateKeys, listen, type Running } from "../../protocol.ts";
import {
  bare,
  hire,
  HOST,
  knockAt,
  logIn,
  newClient,
  percentile,
  ROLE,
  sendEvenly,
  serve,
  type Session,
} from "../loopback.ts";
import { show, sleep, type Socket } from "../loopback.ts";
import { start } from "../programs.ts";

/** Other jobs on the machine can spoil a measurement: so often each is made, and the best one counts. */
const ATTEMPTS = 4;
/** An attack that leaves its host at less than this part of its rate is none. */
const REACHED = 0.6;
/** The same where the machine is the limit. */
const REACHED_ALL = 0.3;
const NO_ID = "0".repeat(16);
const UNKNOWN_NAT = { mapping: "unknown", filtering: "unknown", allocation: "unknown" } as const;
const KEEPALIVE: ControlBody = { type: "KEEPALIVE", cookie: NO_ID, rttMs: 0, nat: UNKNOWN_NAT, local: [] };
/** What the bare echo sends back; an attack has none of this length. */
const ECHO_BYTES = 60;

const STRANGERS = [
  "LOGIN without a cookie",
  "LOGIN with a false cookie",
  "LOGIN with a true cookie and a wrong MAC",
  "session messages with unknown tokens",
  "STUN requests",
  "noise",
];
const ALL_STRANGERS = "each of these";

interface Attack {
  kind: string;
  port: number; // the server's, or the bare echo's
  rate: number; // datagrams a second in all
  ms: number;
}
interface CrowdAttack extends Attack {
  speakers: number; // how many of the sessions take part
}
interface StrangerAttack extends Attack {
  from: string;
}
interface Report {
  rate: number; // that was reached
}

// ---------------------------------------------------------------------------------------------------- helpers

async function echo(): Promise<never> {
  const socket: Socket = await bare((data, port) => {
    if (data.length === ECHO_BYTES) return socket.send(data, port);
  });
  return serve(() => ({ port: socket.port }));
}

/** Ordinary sessions of one host: what each says is sealed and new. */
function crowd(): Promise<never> {
  const sessions: Session[] = [];
  const body = randomBytes(100),
    say: Record<string, (number: number) => ControlBody> = {
      GETALLUSER: () => ({ type: "GETALLUSER", prefix: "", after: "" }),
      KEEPALIVE: () => KEEPALIVE,
      P2PTRANS: (number) => {
        const { name: to, nonce } = sessions[(number * 7 + 1) % sessions.length]!;
        return { type: "P2PTRANS", to, nonce, call: 0, body };
      },
    };
  return serve(async (order: CrowdAttack | { port: number; from: string; count: number }): Promise<Report> => {
    if ("from" in order) {
      for (let i = 0; i < order.count; i += 8) { // a few at a time, as the server's socket holds them
        const some = Array.from({ length: Math.min(8, order.count - i) }, (_, j) => `${order.from}-${i + j}`);
        sessions.push(...await Promise.all(some.map((name) => logIn(name, order))));
      }
      setPriority(19); // from now on it stands for a machine elsewhere, whose work costs the others nothing
      return { rate: sessions.length };
    }
    const rate = await sendEvenly(order, (sent) => {
      const { socket, seal } = sessions[sent % order.speakers]!;
      return socket.send(seal(say[order.kind]!(sent)), order.port);
    });
    return { rate };
  });
}

/** Somebody without a session, at many ports of one address. */
function strangers(): Promise<never> {
  const noise = randomBytes(65_536), PORTS = 64;
  let models: Record<string, Uint8Array[]> = {}, sockets: Socket[] = [];

  /** A LOGIN as a real client writes it, without a cookie and with one. */
  async function ask(
    serverPort: number,
    from: string,
  ): Promise<{ socket: Socket; first: Uint8Array; second: Uint8Array }> {
    const { client } = newClient(`stranger-${sockets.length}`, serverPort);
    let take = (_data: Uint8Array) => {};
    const second = new Promise<Uint8Array>((resolve) => take = resolve);
    const socket = await bare((data) => {
      for (const effect of client.receive({ socket: 0, from: `${HOST}:${serverPort}`, data }, clock())) {
        if (effect.kind === "send" && decode(effect.data)?.type === "LOGIN") take(effect.data);
      }
    }, from);
    const first = client.opened(0, socket.port, clock()).find((effect) => effect.kind === "send")!.data;
    const again = setInterval(() => socket.send(first, serverPort), 200);
    await socket.send(first, serverPort);
    const answer = await second;
    clearInterval(again);
    socket.deafen();
    return { socket, first, second: answer };
  }

  /** The same with other bytes from there on; negative: from the end. */
  function changed(data: Uint8Array, at: number, length: number, sent: number): Uint8Array {
    const copy = data.slice();
    copy.set(noise.subarray((sent * 37) % 60_000).subarray(0, length), at < 0 ? data.length + at : at);
    return copy;
  }

  const kinds: Record<string, (sent: number) => Uint8Array> = {
    "LOGIN without a cookie": (sent) => changed(models["first"]![sent % PORTS]!, 2, 8, sent),
    "LOGIN with a false cookie": (sent) => {
      const data = models["second"]![sent % PORTS]!, message = decode(data)!;
      const at = message.type === "LOGIN" ? Buffer.from(data).indexOf(Buffer.from(message.cookie, "hex")) : -1;
      return changed(data, at, 8, sent);
    },
    "LOGIN with a true cookie and a wrong MAC": (sent) => changed(models["second"]![sent % PORTS]!, -8, 8, sent),
    "session messages with unknown tokens": (sent) => changed(models["unknown"]![0]!, 2, 8, sent),
    "STUN requests": (sent) => changed(models["stun"]![0]!, 8, 12, sent),
    "noise": (sent) => changed(models["noise"]![sent % PORTS]!, 1, 100, sent),
  };

  return serve(async (order: StrangerAttack): Promise<Report> => {
    for (const socket of sockets) socket.close();
    const asked = await Promise.all(Array.from({ length: PORTS }, () => ask(order.port, order.from)));
    setPriority(19);
    sockets = asked.map(({ socket }) => socket);
    models = {
      first: asked.map(({ first }) => first),
      second: asked.map(({ second }) => second),
      unknown: [encode(KEEPALIVE, { id: NO_ID, counter: Math.floor(clock()) })],
      stun: [Buffer.from("000100002112a442" + "00".repeat(12), "hex")],
      noise: asked.map((_, i) => Uint8Array.from(randomBytes(120 + 16 * i)).fill(255, 0, 1)),
    };
    const rate = await sendEvenly(order, (sent) => {
      const kind = order.kind === ALL_STRANGERS ? STRANGERS[Math.floor(sent / PORTS) % STRANGERS.length]! : order.kind;
      return sockets[sent % PORTS]!.send(kinds[kind]!(sent), order.port);
    });
    return { rate };
  });
}

if (ROLE === "echo") await echo();
if (ROLE === "crowd") await crowd();
if (ROLE === "strangers") await strangers();

// ---------------------------------------------------------------------------------------------------- honest people

const random = (length: number) => Uint8Array.from(randomBytes(length));

/** A client on a real socket of that address; `entered` when it is in. */
async function come(name: string, { port, from, onEvent }: {
  port: number;
  from: string;
  onEvent?: (event: ClientEvent) => void;
}) {
  const options = { name, keys: generateKeys(), servers: [`${HOST}:${port}`], random, generateKeys, direct: false };
  const client = createClient(options);
  let enter = () => {}, askedAt = 0;
  const entered = new Promise<void>((resolve) => enter = resolve);
  const running: Running<ClientEvent> = await listen(client, {
    sockets: [{ host: from, port: 0 }],
    onEvent(event) {
      if (event.event === "login") enter();
      onEvent?.(event);
    },
    onDatagram: (way) => void (askedAt ||= way === "out" ? clock() : 0),
  });
  return { client, running, entered, askedAt: () => askedAt };
}

const COUPLES = 3, INTERVAL_MS = 100, TALK_MS = 2_000, WARM_UP_MS = 800;

interface Friend {
  to: string;
  sentAt: Map<string, number>; // by text
  latencies: Map<string, number>;
  write(text: string): void;
  close(): void;
}

/** Those who talk over the relay, at an address of their own. */
async function makeCouples(port: number): Promise<Friend[]> {
  const friends = new Map<string, Friend>();
  const names = Array.from({ length: 2 * COUPLES }, (_, i) => `${i % 2 === 0 ? "a" : "b"}${i >> 1}`);
  for (const name of names) {
    const to = `${name[0] === "a" ? "b" : "a"}${name.slice(1)}`, sentAt = new Map<string, number>();
    const onEvent = (event: ClientEvent) => {
      if (event.event !== "message") return;
      const { latencies, sentAt } = friends.get(event.from)!;
      if (!latencies.has(event.text)) latencies.set(event.text, clock() - sentAt.get(event.text)!);
    };
    const { client, running, entered } = await come(name, { port, from: "127.0.5.1", onEvent });
    const write = (text: string) => {
      sentAt.set(text, clock());
      running.perform(client.command({ command: "send", to, text }, clock()));
    };
    friends.set(name, { to, sentAt, latencies: new Map(), write, close: () => running.close() });
    await entered;
  }
  return [...friends.values()];
}

/** All write for a while, evenly: how long it took. What has not come after so long counts as that long. */
async function talk(friends: Friend[], topic: string, ms = TALK_MS): Promise<number[]> {
  const begun = clock(), texts: string[] = [];
  for (let i = 0; i * INTERVAL_MS < ms * friends.length; i++) {
    const due = begun + i * INTERVAL_MS / friends.length, text = `${topic} ${i}`;
    if (due > clock()) await sleep(due - clock());
    friends[i % friends.length]!.write(text);
    texts.push(text);
  }
  const isLate = (text: string, i: number) => !friends[i % friends.length]!.latencies.has(text);
  for (const limit = clock() + 10_000; clock() < limit && texts.some(isLate);) await sleep(20);
  return texts.map((text, i) => {
    const { latencies, sentAt } = friends[i % friends.length]!;
    return latencies.get(text) ?? clock() - sentAt.get(text)!;
  });
}

/** The same at a bare echo. */
const knock = (port: number) =>
  knockAt(port, { askers: 2 * COUPLES, bytes: ECHO_BYTES, everyMs: INTERVAL_MS, ms: TALK_MS });

/** Does something while the attack lasts, but for its first moments; what was measured and the rate of the attack. */
async function during<T>(attack: Promise<Report>, measure: () => Promise<T>): Promise<{ measured: T; rate: number }> {
  attack.catch(() => {});
  await sleep(300);
  const measured = await measure();
  return { measured, rate: (await attack).rate };
}

const table: Record<string, Record<string, number>> = {};
function note(
  what: string,
  rate: number,
  latencies: number[],
  { share, limit }: { share?: number; limit?: number } = {},
) {
  const allowed = limit === undefined ? {} : { [`p${share! * 100} may be`]: Number(limit.toFixed(1)) };
  table[what] = { "a second": rate, count: latencies.length, ...show(latencies), ...allowed };
}
function showTable(title: string): void {
  console.log(title);
  console.table(table);
  for (const what in table) delete table[what];
}

// ---------------------------------------------------------------------------------------------------- the tests

const SESSIONS = 400;
/** A tenth more than what they may all ask; what fills the server's queue for 10 s; ten times what one may (2,000/s). */
const CROWDS: { what: string; kind: string; speakers: number; rate: number }[] = [
  { what: `${SESSIONS} ask GETALLUSER`, kind: "GETALLUSER", speakers: SESSIONS, rate: 5_500 },
  { what: "100 ask GETALLUSER, 127 KiB/s", kind: "GETALLUSER", speakers: 100, rate: 2_000 },
  { what: `${SESSIONS} send P2PTRANS to each other`, kind: "P2PTRANS", speakers: SESSIONS, rate: 20_000 },
  { what: `${SESSIONS} send KEEPALIVE`, kind: "KEEPALIVE", speakers: SESSIONS, rate: 20_000 },
];

/** What the issue allows: twice the calm p95, and this. */
const GROWTH = 2, EXTRA_MS = 5;

async function besideACrowd(): Promise<void> {
  const began = performance.now(), tooSlow: string[] = [];
  const echoing = hire<null, { port: number }>(import.meta.url, "echo"), echoPort = (await echoing.ask(null)).port;
  await knock(echoPort); // for the compiler
  for (const [i, { what, kind, speakers, rate }] of CROWDS.entries()) {
    const server = start("server", ["--host", HOST, "--port", "0", "--json"]); // a fresh one: no attack spoils the next
    const crowd = hire<object, Report>(import.meta.url, "crowd");
    const friends: Friend[] = [];
    try {
      const port = Number((await server.until({ event: "listening" }))["port"]);
      friends.push(...await makeCouples(port));
      await crowd.ask({ port, from: `127.0.${9 + i}.1`, count: SESSIONS });
      await talk(friends, "warm-up", WARM_UP_MS);
      for (let attempt = 1;; attempt++) {
        const round = attempt === 1 ? "" : `, again ${attempt}`;
        let growth = GROWTH;
        const attack = (port: number) => crowd.ask({ kind, port, rate, speakers, ms: TALK_MS + 600 });
        if (attempt > 1) {
          const calm = await knock(echoPort);
          const { measured, rate } = await during(attack(echoPort), () => knock(echoPort));
          note(`bare echo, calm${round}`, 0, calm);
          note(`bare echo, ${what}${round}`, rate, measured);
          growth = Math.max(growth, percentile(measured, 0.95) / percentile(calm, 0.95));
        }
        const calm = await talk(friends, `calm ${attempt}`), limit = growth * percentile(calm, 0.95) + EXTRA_MS;
        note(`calm, ${what}${round}`, 0, calm);
        const { measured, rate: reached } = await during(attack(port), () => talk(friends, `attack ${attempt}`));
        note(`${what}${round}`, reached, measured, { share: 0.95, limit });
        if (reached >= REACHED * rate && percentile(measured, 0.95) <= limit) break;
        if (attempt < ATTEMPTS) continue;
        tooSlow.push(what);
        break;
      }
    } finally {
      for (const friend of friends) friend.close();
      crowd.end();
      server.signal("SIGKILL");
      await server.ended;
    }
  }
  echoing.end();
  const seconds = ((performance.now() - began) / 1_000).toFixed(0);
  showTable(
    `${COUPLES} couples on the relay, a message each way every ${INTERVAL_MS} ms, beside one host; ${seconds} s`,
  );
  assert.deepEqual(tooSlow, [], `p95 is over twice the calm one + ${EXTRA_MS} ms, ${ATTEMPTS} times`);
}

const STRANGER_RATE = 15_000, CALM_LOGINS = 25, RUSH_LOGINS = 50, NEWCOMER_MS = 35;
/** What the issue allows. */
const LOGIN_GROWTH = 10;

let newcomers = 0;
/**
 * Newcomers log in, one every NEWCOMER_MS: if each waited for the one before, those who are let in at once would be
 * most of all. For whoever still waits at the end it took as long as until then.
 */
async function comeAndGo(port: number, count: number): Promise<number[]> {
  const begun = clock(), end = begun + count * NEWCOMER_MS + 500, times: Promise<number>[] = [];
  const one = async () => {
    const { client, running, entered, askedAt } = await come(`newcomer-${newcomers++}`, { port, from: "127.0.6.1" });
    await Promise.race([entered, sleep(end - clock())]);
    const ms = clock() - askedAt();
    running.perform(client.command({ command: "exit" }, clock()));
    await sleep(20);
    running.close();
    return ms;
  };
  while (times.length < count) {
    const due = begun + times.length * NEWCOMER_MS;
    if (due > clock()) await sleep(due - clock());
    times.push(one());
  }
  return Promise.all(times);
}

async function amongStrangers(): Promise<void> {
  const began = performance.now(), tooSlow: string[] = [];
  for (const [i, kind] of [...STRANGERS, ALL_STRANGERS].entries()) {
    const isAll = kind === ALL_STRANGERS, asked = STRANGER_RATE * (isAll ? STRANGERS.length : 1);
    const share = isAll ? 0.5 : 0.95; // so many together reach the limit of the machine, which loses some
    const server = start("server", ["--host", HOST, "--port", "0", "--json"]);
    const strangers = hire<StrangerAttack, Report>(import.meta.url, "strangers");
    try {
      const port = Number((await server.until({ event: "listening" }))["port"]);
      await comeAndGo(port, 8); // for the compiler
      for (let attempt = 1;; attempt++) {
        const round = attempt === 1 ? "" : `, again ${attempt}`;
        const calm = await comeAndGo(port, CALM_LOGINS), limit = LOGIN_GROWTH * percentile(calm, 0.5);
        const ms = RUSH_LOGINS * NEWCOMER_MS + 1_500; // the first of it until all its ports have cookies
        const from = `127.0.${9 + i * ATTEMPTS + attempt}.1`; // another one each time, which has used up nothing yet
        const rush = strangers.ask({ kind, port, rate: asked, ms, from });
        const { measured, rate } = await during(rush, async () => {
          await sleep(500);
          return comeAndGo(port, RUSH_LOGINS);
        });
        note(`calm, ${kind}${round}`, 0, calm);
        note(`${kind}${round}`, rate, measured, { share, limit });
        if (rate >= (isAll ? REACHED_ALL : REACHED) * asked && percentile(measured, share) <= limit) break;
        if (attempt < ATTEMPTS) continue;
        tooSlow.push(kind);
        break;
      }
    } finally {
      strangers.end();
      server.signal("SIGKILL");
      await server.ended;
    }
  }
  const seconds = ((performance.now() - began) / 1_000).toFixed(0);
  showTable(`logins while one host sends ${STRANGER_RATE} a second; ${seconds} s`);
  assert.deepEqual(tooSlow, [], `Logins take over ${LOGIN_GROWTH} times their calm median, ${ATTEMPTS} times`);
}

if (ROLE === undefined) {
  const { test } = await import("node:test");
  const options = { timeout: 400_000, skip: process.platform !== "linux" };
  test(
    `couples on the relay beside ${SESSIONS} sessions of one host that ask as much as they may`,
    options,
    besideACrowd,
  );
  test(`newcomers log in while one host sends ${STRANGER_RATE} strangers' datagrams a second`, options, amongStrangers);
}
