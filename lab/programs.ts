/**
 * Starts the real programs as processes and waits for what they say: what the demo and the tests of the programs use.
 * `deno.json` tells what Deno is to allow them, as for whoever types `deno task client`.
 *
 * @module
 */
import { spawn } from "node:child_process";
import { accessSync, constants, readFileSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** For an event that must come. Nothing is decided by it: a program that will not say it is what the limit is for. */
const PATIENCE_MS = 60_000;

// ---------------------------------------------------------------------------------------------------- runtimes

export type Runtime = "deno" | "bun";
/** The one that runs this file. */
export const OWN: Runtime = "Deno" in globalThis ? "deno" : "bun";
export const OTHER: Runtime = OWN === "deno" ? "bun" : "deno";

const ROOT = fileURLToPath(new URL("..", import.meta.url).href);
const { tasks } = JSON.parse(readFileSync(join(ROOT, "deno.json"), "utf8")) as { tasks: Record<string, string> };

/** The file that starts a runtime; null if it is not here. */
export function executable(runtime: Runtime): string | null {
  if (runtime === OWN) return process.execPath;
  for (const directory of (process.env["PATH"] ?? "").split(delimiter)) {
    for (const suffix of process.platform === "win32" ? [".exe", ".cmd"] : [""]) {
      const file = join(directory, runtime + suffix);
      try {
        accessSync(file, constants.X_OK);
        return file;
      } catch { /* not in this directory */ }
    }
  }
  return null;
}

// ---------------------------------------------------------------------------------------------------- programs

/** A line of `--json`; `at` is when it came, in ms. */
export type Event = { event: string; at: number; [field: string]: unknown };
/** Fields that an event must have, or have text like. */
export type Want = Record<string, string | number | boolean | RegExp>;

/** A server or a client at work. */
export interface Program {
  program: "server" | "client";
  args: string[];
  name: string;
  runtime: Runtime;
  events: Event[];
  stdout(): string;
  stderr(): string;
  type(line: string): void; // types a line
  pipe(...lines: string[]): void; // ends its input, with some last lines
  /** The first event, past or future, from number `from` on, with all wanted fields. Fails if the program ends first. */
  until(want: Want, options?: { from?: number }): Promise<Event>;
  says(words: RegExp): Promise<void>; // waits for such words on stdout or stderr, as `until` waits for an event
  signal(name: "SIGINT" | "SIGTERM" | "SIGKILL" | "SIGSTOP" | "SIGCONT"): void;
  ended: Promise<number | string>; // its exit code; the name of the signal if that ended it
  evidence(): string; // what to show when something went wrong
}

/** Everything that was started and has not ended. */
export const running = new Set<Program>();
process.on("exit", () => {
  for (const program of running) program.signal("SIGKILL");
});

/** What follows the runtime's name on the command line, before any arguments of the program's own. */
export function wordsOf(program: "server" | "client", runtime: Runtime = OWN, flags: string[] = []): string[] {
  const [, run, ...rest] = tasks[program]!.split(" ");
  return runtime === "deno" ? [run!, ...flags, ...rest] : [`${program}.ts`];
}

/** The flags with which Deno lets a program use the files on its command line; on a terminal it would ask for them. */
export function flagsFor(args: string[]): string[] {
  const after = (...options: string[]) =>
    args.filter((_, i) => options.includes(args[i - 1]!)).filter((file) => file !== "-");
  const files = after("--secret-file", "--password-file"),
    identities = after("--identity").map((file) => dirname(file));
  const flag = (name: string, paths: string[]) => paths.length > 0 ? [`--allow-${name}=${paths.join(",")}`] : [];
  return [...flag("read", [...files, ...identities]), ...flag("write", identities)];
}

/**
 * Starts `server.ts` or `client.ts`: on Deno with the permissions of its task in deno.json, those for the files that it
 * is to use, and no others.
 */
export function start(
  program: "server" | "client",
  args: string[],
  options: { name?: string; runtime?: Runtime; env?: Record<string, string>; words?: string[]; cwd?: string } = {},
): Program {
  const { name = program, runtime = OWN, env = {}, cwd = ROOT, words = wordsOf(program, runtime, flagsFor(args)) } =
    options;
  const { PUNCH_SECRET: _secret, PUNCH_PASSWORD: _password, ...inherited } = process.env;
  const child = spawn(executable(runtime)!, [...words, ...args], {
    cwd,
    env: { ...inherited, DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1", ...env },
  });
  const events: Event[] = [], waiting = new Set<() => void>();
  let stdout = "", stderr = "", rest = "", end: number | string | null = null;
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    stdout += text;
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    for (const line of lines) {
      try {
        events.push({ ...JSON.parse(line), at: performance.now() });
      } catch { /* for people */ }
    }
    for (const look of waiting) look();
  });
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
    for (const look of waiting) look();
  });
  child.stdin.on("error", () => {}); // it has ended: `until` and `ended` tell
  const ended = new Promise<number | string>((resolve) => {
    child.on("error", (error) => resolve(error.message));
    child.on("close", (code, signal) => resolve(signal ?? code ?? 1));
  }).then((how) => {
    end = how;
    running.delete(self);
    for (const look of waiting) look();
    return how;
  });

  /** Looks for something each time that the program has said something, until it has come. */
  function when<T>(what: string, find: () => T | undefined): Promise<T> {
    return new Promise((resolve, reject) => {
      const look = () => {
        const found = find();
        if (found !== undefined) resolve(found);
        else if (end !== null) reject(new Error(`${name} ended with ${end} before: ${what}\n${self.evidence()}`));
        else return;
        waiting.delete(look);
        clearTimeout(timer);
      };
      const timer = setTimeout(() => {
        waiting.delete(look);
        reject(new Error(`${name} did not say in ${PATIENCE_MS} ms: ${what}\n${self.evidence()}`));
      }, PATIENCE_MS);
      waiting.add(look);
      look();
    });
  }

  const self: Program = {
    program,
    args,
    name,
    runtime,
    events,
    stdout: () => stdout,
    stderr: () => stderr,
    type: (line) => void child.stdin.write(`${line}\n`),
    pipe: (...lines) => void child.stdin.end(lines.map((line) => `${line}\n`).join("")),
    until(want, { from = 0 } = {}) {
      const wants = Object.entries(want);
      return when(
        wants.map(([field, value]) => `${field} ${value}`).join(", "),
        () =>
          events.slice(from).find((event) =>
            wants.every(([field, value]) =>
              value instanceof RegExp ? value.test(String(event[field])) : value === event[field]
            )
          ),
      );
    },
    says: async (words) => void await when(String(words), () => words.test(stdout) || words.test(stderr) || undefined),
    // Not child.kill: Deno would then report the signal in place of the exit code.
    signal: (name) => {
      if (end === null) process.kill(child.pid!, name);
    },
    ended,
    evidence: () =>
      `--- ${name} (${runtime}) ${args.join(" ")}: ${end === null ? "at work" : `ended with ${end}`}\n` +
      `${stdout.slice(-2000)}--- its stderr\n${stderr.slice(-2000)}`,
  };
  running.add(self);
  return self;
}
