/**
 * The oracle: one hash for each world of `worlds.ts`, over every effect of every machine in order. A change of
 * server.ts, client.ts or protocol.ts that keeps all hashes has changed no behaviour that the worlds can see.
 *
 *     deno run -A lab/oracle.ts [NAME...]            runs the worlds whose names contain one of these words, or all
 *     deno run -A lab/oracle.ts --update             writes oracle.json: what is so now is right
 *     deno run -A lab/oracle.ts --log NAME           every effect of that world, one a line
 *     deno run -A lab/oracle.ts --against DIR        runs the worlds here and in another checkout, and shows the first
 *                                                    effect that differs; with --all only which worlds differ
 *
 * @module
 */
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { explain } from "../protocol.ts";
import type { Watch } from "./scenario.ts";
import { WORLDS } from "./worlds.ts";
import "./worlds_hostile.ts";
import "./worlds_people.ts";

const CONTEXT = 10; // effects shown before the first that differs
const FAILED = "an error".padEnd(16, "!"); // in place of a hash
const EXPECTED = fileURLToPath(new URL("oracle.json", import.meta.url).href);

const USAGE = `The oracle: a hash of all that server and clients do, in each of some 300 worlds.

  lab/oracle.ts [NAME...]                        run the worlds whose names contain one of these words, or all
  lab/oracle.ts --update [NAME...]               write their hashes to lab/oracle.json: what is so now is right
  lab/oracle.ts --log NAME                       print every effect of that world
  lab/oracle.ts --against DIR [--all] [NAME...]  compare with another checkout: the first effect that differs, or
                                                 with --all the names of all worlds that differ`;

/** One effect, as it is hashed: `data` and `event` as text, so that two runs can be compared. */
export interface Entry {
  machine: string;
  now: number;
  kind: string;
  socket?: number | undefined;
  to?: string | undefined;
  ttl?: number | undefined;
  data?: string | undefined; // hex
  event?: string | undefined; // canonical JSON
}

/** JSON whose keys are in order, so that it does not matter in which order a program has named them. */
const canonical = (value: unknown) =>
  JSON.stringify(
    value,
    (_, inner) =>
      inner && typeof inner === "object" && !Array.isArray(inner)
        ? Object.fromEntries(Object.entries(inner).sort(([one], [other]) => one < other ? -1 : 1))
        : inner,
  );

/** Which worlds there are, of those whose names contain one of the words. */
export function namesWith(words: string[]): string[] {
  return [...WORLDS.keys()].filter((name) => words.length === 0 || words.some((word) => name.includes(word)));
}

/** The hash of a world. */
export function hashOf(name: string): string {
  const hash = createHash("sha256");
  WORLDS.get(name)!((machine, now, effect) => {
    const { kind } = effect, head = `${machine} ${now} ${kind}`;
    if (kind === "event") hash.update(`${head} ${canonical(effect.event)}\n`);
    else if (kind !== "send") hash.update(`${head} ${effect.socket}\n`);
    else {
      const { socket, to, ttl = "", data } = effect;
      hash.update(`${head} ${socket} ${to} ${ttl} ${data.length}\n`).update(data);
    }
  });
  return hash.digest("hex").slice(0, 16);
}

/** All effects of a world; if a machine throws, those before that, and the reason on stderr. */
export function logOf(name: string): Entry[] {
  const entries: Entry[] = [];
  const watch: Watch = (machine, now, effect) => {
    const { kind } = effect;
    if (kind === "event") entries.push({ machine, now, kind, event: canonical(effect.event) });
    else if (kind !== "send") entries.push({ machine, now, kind, socket: effect.socket });
    else {
      const { socket, to, ttl, data } = effect;
      entries.push({ machine, now, kind, socket, to, ttl, data: Buffer.from(data).toString("hex") });
    }
  };
  try {
    WORLDS.get(name)!(watch);
  } catch (error) {
    console.error(`${name}: ${error instanceof Error ? error.stack : error}`);
  }
  return entries;
}

/** The hashes that are right. */
export function expected(): Record<string, string> {
  return JSON.parse(readFileSync(EXPECTED, "utf8"));
}

/** One effect in words; the time is that since the world began. */
function inWords({ machine, now, kind, socket, to, ttl, data, event }: Entry, began: number): string {
  const head = `${(now - began).toFixed(3).padStart(12)} ${machine.padEnd(8)} ${kind.padEnd(5)}`;
  if (kind === "event") return `${head} ${event}`;
  if (kind !== "send") return `${head} socket ${socket}`;
  const bytes = Buffer.from(data!, "hex"), short = createHash("sha256").update(bytes).digest("hex").slice(0, 8);
  return `${head} ${socket} -> ${to}${ttl === undefined ? "" : ` ttl ${ttl}`} ${short} ${explain(bytes)}`;
}

// ---------------------------------------------------------------------------------------------------- two checkouts

/** The lines that the oracle of another checkout prints; `stop` ends it. */
function elsewhere(dir: string, args: string[]) {
  const runtime = "Deno" in globalThis ? ["run", "-A"] : [];
  const file = resolve(dir, "lab/oracle.ts");
  const env = { ...process.env, DENO_NO_UPDATE_CHECK: "1" };
  const child = spawn(process.execPath, [...runtime, file, ...args], { cwd: dir, env, stdio: ["ignore", "pipe", 2] });
  const ended = new Promise((done) => child.on("close", (code, signal) => done(signal ?? code)));
  return { lines: createInterface({ input: child.stdout! }), stop: () => child.kill(), ended };
}

/** Tells which worlds differ there, as soon as that is known; the names that the other one does not know are left out. */
async function* differing(names: string[], dir: string): AsyncGenerator<string> {
  const { lines, stop, ended } = elsewhere(dir, ["--hashes", "--", ...names]);
  let isStopped = false;
  try {
    for await (const line of lines) {
      const [there, name = ""] = [line.slice(0, 16), line.slice(17)];
      if (!WORLDS.has(name)) throw new Error(`The oracle in "${dir}" said: ${line}`);
      if (there !== hashOrError(name)) yield name;
    }
    const code = await ended;
    if (code !== 0) throw new Error(`The oracle in "${dir}" ended with ${code}`);
    isStopped = true;
  } finally {
    if (!isStopped) stop();
  }
}

/** A machine that throws has a hash as well, and the worlds after it are not lost. */
function hashOrError(name: string): string {
  try {
    return hashOf(name);
  } catch (error) {
    console.error(`${name}: ${error} (for more: --log "${name}")`);
    return FAILED;
  }
}

/** Shows the first effect that differs, and what came before. */
async function showDifference(name: string, dir: string): Promise<void> {
  const { lines, ended } = elsewhere(dir, ["--raw", name]);
  const theirs: string[] = [];
  for await (const line of lines) theirs.push(line);
  await ended;
  const ours = logOf(name).map((entry) => JSON.stringify(entry));
  const first = Array.from({ length: Math.max(ours.length, theirs.length) }).findIndex((_, i) => ours[i] !== theirs[i]);
  if (first < 0) return console.log(`${name}: the ${ours.length} effects are the same when it runs alone`);
  const began = JSON.parse(ours[0] ?? theirs[0]!).now;
  const shown = (line: string | undefined) => line === undefined ? "nothing more" : inWords(JSON.parse(line), began);
  console.log(`${name}: effect ${first} of ${ours.length} here and ${theirs.length} there differs`);
  for (let i = Math.max(0, first - CONTEXT); i < first; i++) console.log(`      ${shown(ours[i])}`);
  console.log(`here  ${shown(ours[first])}\nthere ${shown(theirs[first])}`);
  const [here, there] = [ours[first], theirs[first]].map((line) => line ? JSON.parse(line) as Entry : null);
  if (!here || !there) return;
  for (const field of ["machine", "now", "kind", "socket", "to", "ttl", "data", "event"] as const) {
    const [one, other] = [`${here[field]}`, `${there[field]}`];
    if (one === other) continue;
    let same = 0;
    while (one[same] === other[same]) same++;
    const around = (text: string) => (same > 40 ? "..." : "") + text.slice(Math.max(0, same - 40), same + 80);
    console.log(`  ${field} here  ${around(one)}\n  ${field} there ${around(other)}`);
  }
}

// ---------------------------------------------------------------------------------------------------- command line

async function main(): Promise<number> {
  const { parseArgs } = await import("deno-std@1.4.0/cli/parse_args.js");
  const given = parseArgs(process.argv.slice(2), {
    boolean: ["update", "all", "hashes", "raw", "help"],
    string: ["log", "against"],
  });
  if (given.help) return console.log(USAGE), 0;
  const names = namesWith(given._.map(String));
  if (names.length === 0) throw new Error(`No world is called "${given._.join('" or "')}"`);
  if (given.log !== undefined) {
    const name = namesWith([given.log]).sort((one, other) => one.length - other.length)[0];
    if (!name) throw new Error(`No world is called "${given.log}"`);
    const entries = logOf(name);
    console.log(`${name}: ${entries.length} effects`);
    for (const entry of entries) console.log(inWords(entry, entries[0]!.now));
    return 0;
  }
  if (given.raw) {
    for (const entry of logOf(String(given._[0]))) console.log(JSON.stringify(entry));
    return 0;
  }
  if (given.hashes) {
    for (const name of given._.map(String)) if (WORLDS.has(name)) console.log(`${hashOrError(name)} ${name}`);
    return 0;
  }
  if (given.against !== undefined) {
    let count = 0;
    for await (const name of differing(names, given.against)) {
      count++;
      if (given.all) console.log(name);
      else return await showDifference(name, given.against), 1;
    }
    console.log(count === 0 ? `All of ${names.length} worlds are the same` : `${count} of ${names.length} differ`);
    return count === 0 ? 0 : 1;
  }
  const right = given.update ? {} : expected(), found: Record<string, string> = {};
  let differ = 0;
  const began = performance.now();
  for (const name of names) {
    const start = performance.now(), hash = found[name] = hashOrError(name);
    const isRight = given.update || right[name] === hash;
    if (!isRight) differ++;
    const ms = `${Math.round(performance.now() - start)} ms`.padStart(8);
    console.log(`${hash} ${isRight ? "ok     " : "DIFFERS"} ${ms}  ${name}`);
  }
  console.log(`${names.length} worlds in ${((performance.now() - began) / 1000).toFixed(1)} s, ${differ} differ`);
  if (given.update && Object.values(found).includes(FAILED)) throw new Error("Nothing is written: a world has failed");
  if (given.update) {
    const all = names.length === WORLDS.size ? found : { ...expected(), ...found };
    writeFileSync(EXPECTED, JSON.stringify(all, null, 2) + "\n");
  }
  return differ === 0 ? 0 : 1;
}

if (import.meta.main) {
  process.exitCode = await main().catch((error) => {
    console.error(error instanceof Error ? error.message : error);
    return 2;
  });
}
