/**
 * Cases with real programs: each has servers and clients to itself, several run at a time, and what the programs say with
 * `--json` is checked against the events that are documented.
 *
 * @module
 */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { type Program, type Runtime, start } from "./programs.ts";

/** Cases at the same time; more would measure how long a runtime takes to start. */
const CONCURRENT = 6;
/** Of a case that hangs. */
const CASE_LIMIT_MS = 120_000;
/** As the runner sees it, a case waits for its turn too. */
const LIMIT_MS = 600_000;

// ---------------------------------------------------------------------------------------------------- events

const ENDPOINT = /^(\d+\.\d+\.\d+\.\d+|\[[0-9a-f:.]+\]):\d+$/;
type Check = (value: unknown) => boolean;
const isText: Check = (value) => typeof value === "string";
const isNumber: Check = (value) => typeof value === "number" && Number.isFinite(value) && value >= 0;
const isEndpoint: Check = (value) => isText(value) && ENDPOINT.test(String(value));
const isOneOf = (...values: unknown[]): Check => (value) => values.includes(value);
const isListOf = (check: Check): Check => (value) => Array.isArray(value) && value.every(check);
const isFlag = isOneOf(true, false);
const isFingerprint: Check = (value) => /^([a-z2-9]{4}-){4}[a-z2-9]{4}$/.test(String(value));
const isRtt: Check = (value) => value === null || isNumber(value);
const isPath = isOneOf("relay", "direct", "lan");
const isUser: Check = (value) => {
  const { name, public: endpoint } = value as Record<string, unknown>;
  return isText(name) && (isEndpoint(endpoint) || endpoint === ""); // of --no-direct: nobody is told
};

/** Fields that each event must have. Others may be added. */
const CLIENT_EVENTS: Record<string, Record<string, Check>> = {
  login: {
    ...{ name: isText, server: isEndpoint, public: isEndpoint, local: isListOf(isEndpoint), users: isNumber },
    ...{ fingerprint: isFingerprint, kept: isFlag, secret: isFlag, password: isFlag },
  },
  users: { users: isListOf(isUser) },
  message: { from: isText, text: isText, path: isPath, id: isText },
  sent: { to: isText, id: isText, ok: isOneOf(true, false), ms: isNumber, path: isPath },
  path: { peer: isText, path: isPath, address: isEndpoint, rttMs: isRtt, ms: isNumber },
  nat: {
    mapping: isOneOf("EIM", "ADM", "APDM", "unknown"),
    filtering: isOneOf("EIF", "ADF", "APDF", "unknown"),
    allocation: isOneOf("preserving", "sequential", "block", "random", "unknown"),
    public: isEndpoint,
    hairpin: isOneOf(true, false, null),
    udp: isOneOf(true, false),
  },
  ping: { peer: isText, path: isPath, rttMs: isRtt, lost: isNumber },
  verify: { peer: isText, code: isText },
  blocked: { peers: Array.isArray },
  error: { code: isText, message: isText },
  reconnecting: { name: isText, reason: isText },
  reconnected: { name: isText, reason: isText },
  logout: { name: isText, reason: isText },
};
const SERVER_EVENTS: typeof CLIENT_EVENTS = {
  listening: {
    ...{ address: isText, port: isNumber, altPort: isNumber },
    ...{ fingerprint: isFingerprint, kept: isFlag, secret: isFlag, password: isFlag },
  },
  login: { name: isText, public: isEndpoint },
  moved: { name: isText, public: isEndpoint },
  refused: { name: isText, public: isEndpoint, reason: isText },
  logout: { name: isText, reason: isText },
  error: { code: isText, message: isText },
};
const REASONS = isOneOf("unknown", "offline", "timeout", "empty", "too-long", "untrusted", "blocked");

/** Everything on stdout is an object with the documented fields. */
function assertEvents(program: Program, table: typeof CLIENT_EVENTS): void {
  for (const line of program.stdout().split("\n").filter((line) => line !== "")) {
    let event: Record<string, unknown>;
    try {
      event = JSON.parse(line);
    } catch {
      assert.fail(`${program.name} with --json says on stdout: ${line}`);
    }
    const fields = table[String(event["event"])];
    assert.ok(fields, `${program.name} says something that is not documented: ${line}`);
    for (const [field, check] of Object.entries(fields)) assert.ok(check(event[field]), `"${field}" in ${line}`);
    if (event["event"] === "sent" && !event["ok"]) assert.ok(REASONS(event["reason"]), `"reason" in ${line}`);
  }
}

// ---------------------------------------------------------------------------------------------------- cases

/** What a case has to itself: programs that end with it, and a directory. */
export interface Stage {
  start: typeof start;
  /** A server that listens; its `at` is what the clients take for SERVER. */
  server(
    args?: string[],
    options?: { runtime?: Runtime; host?: string; env?: Record<string, string> },
  ): Promise<Program & { at: string; port: number }>;
  /** A client with `--json` that has logged in. */
  client(at: string, name: string, args?: string[], options?: { runtime?: Runtime }): Promise<Program>;
  /** A client with `--json` that is given these lines and ends; fails unless it ends with `code`. */
  script(
    at: string,
    name: string,
    lines: string[],
    options?: { code?: number; args?: string[]; env?: Record<string, string> },
  ): Promise<Program>;
  file(name: string, text: string, mode?: number): string; // writes a file; the name of it
  directory: string;
}

async function onStage(play: (stage: Stage) => Promise<void>): Promise<void> {
  const programs: Program[] = [];
  const directory = mkdtempSync(join(tmpdir(), "punch-"));
  const stage: Stage = {
    directory,
    start(...args) {
      const program = start(...args);
      programs.push(program);
      return program;
    },
    async server(args = [], { host = "127.0.0.1", ...options } = {}) {
      const port = args.includes("--port") ? [] : ["--port", "0", "--alt-port", "0"];
      const program = stage.start("server", ["--host", host, ...port, "--json", ...args], options);
      const listening = await program.until({ event: "listening" });
      const at = `${host.includes(":") ? `[${host}]` : host}:${listening["port"]}`;
      return Object.assign(program, { at, port: Number(listening["port"]) });
    },
    async client(at, name, args = [], options = {}) {
      const program = stage.start("client", [at, name, "--json", ...args], { name, ...options });
      await program.until({ event: "login" });
      return program;
    },
    async script(at, name, lines, { code = 0, args = [], env = {} } = {}) {
      const program = stage.start("client", [at, name, "--json", ...args], { name, env });
      program.pipe(...lines);
      assert.equal(await program.ended, code, `exit code\n${program.evidence()}`);
      return program;
    },
    file(name, text, mode = 0o600) {
      const path = join(directory, name);
      writeFileSync(path, text, { mode });
      return path;
    },
  };
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`Not done after ${CASE_LIMIT_MS} ms`)), CASE_LIMIT_MS);
  });
  try {
    await Promise.race([play(stage), late]);
    for (const program of programs) {
      if (program.args.includes("--json")) {
        assertEvents(program, program.program === "server" ? SERVER_EVENTS : CLIENT_EVENTS);
      }
    }
  } catch (error) {
    if (error instanceof Error) error.message += `\n${programs.map((program) => program.evidence()).join("")}`;
    throw error;
  } finally {
    clearTimeout(timer);
    for (const program of programs) program.signal("SIGKILL");
    await Promise.all(programs.map(({ ended }) => ended));
    rmSync(directory, { recursive: true });
  }
}

const queue: (() => Promise<void>)[] = [];
let workers: Promise<void>[] | null = null;

/** Some at a time, in the order of this file; the first test that runs starts them all. */
function startAll(): void {
  workers ??= Array.from({ length: CONCURRENT }, async () => {
    for (let next = queue.shift(); next; next = queue.shift()) await next();
  });
}

export function scenario(name: string, play: (stage: Stage) => Promise<void>, unless: string | false = false): void {
  if (unless) {
    console.log(`Skipped: ${name}: ${unless}`);
    test(`${name} (skipped: ${unless})`, { skip: unless }, () => {});
    return;
  }
  const result = new Promise<void>((resolve, reject) => {
    queue.push(() => onStage(play).then(resolve, reject));
  });
  result.catch(() => {}); // its own test tells
  test(name, { timeout: LIMIT_MS }, () => {
    startAll();
    return result;
  });
}

/** What a program has said of that event. */
export const of = (program: Program, event: string) => program.events.filter((entry) => entry.event === event);
