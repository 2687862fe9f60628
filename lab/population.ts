/**
 * How often, how fast and at what cost two users drawn at random become direct: the real machines of server.ts and
 * client.ts behind pairs of NATs drawn from what is published about the world's, in the simulated internet and under
 * virtual time; beside them, over the very same pairs, small models of four well-known systems.
 *
 *     draw two users ---> a world of their own: NATs, R, D, 1 % loss ---> login, 3 s, call, 15 s to become direct
 *          |                                                              messages, a mapping that changes, silence
 *          +------------> ICE, Tailscale, hyperdht, frp: their published constants over the same classes, R and D
 *
 *     deno task population [--pairs 20000] [--seed 1]      the tables, and (10,000 or more) lab/population.svg
 *     deno task population --seed 1 --pair 7               one pair: its NATs and what happened when
 *     deno task population --pairs 6000 --silence 123      called after so many seconds without a word, not after 3
 *
 * The pairs are drawn in mix.ts, the models are in rivals.ts. The shares of the classes are as uncertain as their
 * sources, so what fails is told per pair of classes, not only as a sum.
 *
 * @module
 */
import { spawn } from "node:child_process";
import { writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { CARRIER_MS, drawPair, JITTER_MS, LOSS, MIX, type Outcome, type Pair } from "./mix.ts";
import { type Fate, type Nat, random } from "./network.ts";
import { headline, JUDGED_MS, limit, MODELS } from "./rivals.ts";
import { createWorld, join, type Player, type World } from "./scenario.ts";

/** Fewer pairs do not replace the picture. */
const PICTURE_PAIRS = 10_000;
/** After both are in and before the call: as two people need; the NATs are classified by then. */
const SILENCE_MS = 3_000;
/** For those who are late: whether they ever become direct. */
const EVER_MS = 60_000;
/** A conversation that goes on: so many messages, one every so often [G]. */
const LONG_MESSAGES = 15, LONG_EVERY_MS = 12_000;

// ---------------------------------------------------------------------------------------------------- the real machines

/** The same for the real machines, and what came after. */
export interface Run extends Outcome {
  isIn: boolean; // both have logged in
  delivered: number; // messages, of `sent`
  sent: number;
  duplicates: number;
  slowestMs: number; // of the messages after the first one
  backMs: number; // after a NAT has forgotten: until a message goes directly again; Infinity: never; -1: none has
  direct: number; // of the messages of a long conversation
  long: number;
  path: string; // at last
}

function settle(world: World, { sites, place, isolated }: Pair): [Player, Player] {
  const { net } = world;
  let shared: Nat[] = [];
  const put = (name: string, side: number): Player => {
    const { kind, accessMs, nats, lan } = sites[side]!;
    const chain: Nat[] = [];
    const isFirewall = nats[0]!.firewall === true, isCarrier = kind.carrier !== undefined;
    for (const [level, options] of nats.entries()) {
      const old = place === "router" || (place === "carrier" && level === 0) ? shared[level] : undefined;
      const isOuter = level === 0;
      const outer = isFirewall ? {} : { address: isOuter ? `203.0.113.${10 + side}` : `100.64.${side}.7` };
      const delayMs = isOuter ? isCarrier ? CARRIER_MS : accessMs : accessMs - CARRIER_MS;
      chain.push(old ?? net.nat({ ...options, ...outer, name: `${name} nat ${level}`, behind: chain.at(-1), delayMs }));
    }
    if (side === 0) shared = chain;
    const isPhone = kind.carrier === "cellular", isNextDoor = place === "router" && side === 1;
    const inside = isFirewall ? `198.51.100.${10 + side}` : isPhone && !isNextDoor ? `100.70.${side}.9` : lan;
    const address = isPhone && isNextDoor ? "100.70.0.10" : inside;
    const host = net.host({
      ...{ name, addresses: [address], behind: chain.at(-1) },
      delayMs: isPhone && place !== "router" ? accessMs - CARRIER_MS : 0,
    });
    if (kind.blocked) net.block((packet) => packet.host === name);
    const player = join(world, name, { host, address });
    return { ...player, nat: chain[0]! };
  };
  const players: [Player, Player] = [put("alice", 0), put("bob", 1)];
  if (isolated && place === "carrier") net.block(({ to }) => to.startsWith("100.70."));
  return players;
}

/** How to run a pair: `watch` is told everything, for one pair that is to be understood. */
interface RunOptions {
  silenceMs?: number | undefined;
  watch?: (world: World, players: [Player, Player]) => void;
}

/** Runs the real machines over a pair. */
export function runPair(seed: number | string, pair: Pair, { silenceMs = SILENCE_MS, watch }: RunOptions = {}): Run {
  const world = createWorld({ seed: `${seed} pair ${pair.index}`, loss: LOSS, jitterMs: JITTER_MS });
  const { net } = world;
  const players = settle(world, pair);
  const [alice, bob] = players;
  watch?.(world, players);
  const run: Run = {
    ...{ isIn: false, messageMs: Infinity, directMs: Infinity, datagrams: 0, delivered: 0, sent: 0, duplicates: 0 },
    ...{ slowestMs: 0, backMs: -1, direct: 0, long: 0, path: "" },
  };
  run.isIn = net.runUntil(() => players.every((player) => player.events("login").length > 0), 30_000);
  net.run(silenceMs);
  const start = net.now(), already = alice.process.sent + bob.process.sent;
  const isDirect = () => players.every((player) => player.path() !== "relay");
  const texts = new Set<string>();

  /** Sends, and runs until the sender knows what has become of it. */
  function say(from: Player, to: Player, limitMs: number): { ms: number; isDirect: boolean } {
    const text = `message ${run.sent++}`, at = net.now(), before = from.events("sent").length;
    texts.add(text);
    from.send(to.name, text);
    net.runUntil(() => from.events("sent").length > before, limitMs);
    const outcome = from.events("sent").at(-1), copies = to.events("message").filter((one) => one.text === text);
    if (outcome?.ok && copies.length === 1) run.delivered++;
    return { ms: (copies[0]?.at ?? Infinity) - at, isDirect: (copies[0]?.path ?? "relay") !== "relay" };
  }

  run.sent = 1;
  alice.send("bob", "message 0");
  if (!run.isIn) {
    net.run(JUDGED_MS);
    run.datagrams = alice.process.sent + bob.process.sent - already;
    return run;
  }
  if (net.runUntil(isDirect, JUDGED_MS)) run.directMs = net.now() - start;
  run.datagrams = alice.process.sent + bob.process.sent - already;
  net.runUntil(() => alice.events("sent").length > 0, Math.max(0, start + JUDGED_MS + 1_000 - net.now()));
  if (run.directMs === Infinity && net.runUntil(isDirect, EVER_MS - (net.now() - start))) {
    run.directMs = net.now() - start;
  }
  const first = bob.events("message")[0];
  run.messageMs = first ? first.at - start : Infinity;
  if (first && alice.events("sent")[0]?.ok) run.delivered++;

  run.slowestMs = say(bob, alice, 20_000).ms;
  if (pair.forgets) {
    net.run(1_000);
    const at = net.now();
    players[pair.index % 2]!.nat!.flush();
    run.backMs = Infinity;
    for (let i = 0; i < 10 && run.backMs === Infinity; i++) {
      const [from, to] = i % 2 ? [bob, alice] : [alice, bob];
      const { ms, isDirect } = say(from, to, 20_000);
      run.slowestMs = Math.max(run.slowestMs, ms);
      if (isDirect) run.backMs = net.now() - at;
      else net.run(1_000);
    }
  }
  for (; pair.isLong && run.long < LONG_MESSAGES; run.long++) {
    net.run(LONG_EVERY_MS);
    const [from, to] = run.long % 2 ? [bob, alice] : [alice, bob];
    const { ms, isDirect } = say(from, to, 20_000);
    run.slowestMs = Math.max(run.slowestMs, ms);
    if (isDirect) run.direct++;
  }
  run.duplicates = alice.events("message").length + bob.events("message").length - run.delivered;
  run.path = alice.path();
  return run;
}

// ---------------------------------------------------------------------------------------------------- sums

/** One pair, and what each system made of it; first ours. */
export interface Result {
  pair: Pair;
  run: Run;
  outcomes: Outcome[];
}

/** Runs these pairs in this process. */
export function population(pairs: number, seed: number | string): Result[] {
  return Array.from({ length: pairs }, (_, index) => result(seed, index, attempt(seed, index)));
}

/** An exception in a machine is a finding, and must not hide the other ones. */
function attempt(seed: number | string, index: number, silenceMs?: number): Run {
  try {
    return runPair(seed, drawPair(seed, index), { silenceMs });
  } catch (error) {
    throw new Error(`Pair ${index} of seed ${seed}: ${(error as Error).stack}`);
  }
}

function result(seed: number | string, index: number, run: Run): Result {
  const pair = drawPair(seed, index);
  const models = MODELS.map(({ name, simulate }) => simulate(pair, random(`${seed} ${name} ${index}`)));
  return { pair, run, outcomes: [run, ...models] };
}

export const SYSTEMS: readonly { name: string; hasRelay: boolean }[] = [{ name: "punch", hasRelay: false }, ...MODELS];

function quantile(values: number[], q: number): number {
  return values.toSorted((a, b) => a - b)[Math.max(0, Math.ceil(q * values.length) - 1)] ?? NaN;
}
const share = <T>(items: readonly T[], is: (item: T) => boolean) => items.filter(is).length / items.length;

/** A row of the table. */
export interface Row {
  name: string;
  directOfAll: number;
  directOfCapable: number;
  everOfCapable: number;
  deliveredOfAll: number;
  deliveredOfCapable: number;
  message: number[]; // p50, p95, p99 in ms, of UDP-capable pairs
  direct: number[];
  directOfDirect: number[]; // the same of those that became direct in time
  datagrams: number[]; // mean, p50, p95, of UDP-capable pairs
}

/** Sums up. */
export function summarize(results: readonly Result[]): Row[] {
  const capable = results.filter(({ pair }) => pair.isCapable), levels = [0.5, 0.95, 0.99];
  return SYSTEMS.map(({ name, hasRelay }, i) => {
    const direct = ({ outcomes }: Result) => outcomes[i]!.directMs <= JUDGED_MS;
    const there = ({ outcomes, run }: Result) =>
      i === 0 ? run.isIn && run.delivered === run.sent : hasRelay || outcomes[i]!.messageMs <= EVER_MS;
    const times = (key: keyof Outcome, of: readonly Result[]) => of.map(({ outcomes }) => outcomes[i]![key]);
    const datagrams = times("datagrams", capable);
    return {
      name,
      directOfAll: share(results, direct),
      directOfCapable: share(capable, direct),
      everOfCapable: share(capable, ({ outcomes }) => outcomes[i]!.directMs <= EVER_MS),
      deliveredOfAll: share(results, there),
      deliveredOfCapable: share(capable, there),
      message: levels.map((q) => quantile(times("messageMs", capable), q)),
      direct: levels.map((q) => quantile(times("directMs", capable), q)),
      directOfDirect: levels.map((q) => quantile(times("directMs", capable.filter(direct)), q)),
      datagrams: [
        datagrams.reduce((sum, one) => sum + one, 0) / datagrams.length,
        ...[0.5, 0.95].map((q) => quantile(datagrams, q)),
      ],
    };
  });
}

// ---------------------------------------------------------------------------------------------------- words

const percent = (part: number) => `${(100 * part).toFixed(1)} %`;
const ms = (time: number) => time <= EVER_MS ? Math.round(time).toLocaleString("en") : "never";

/** Numbers stand to the right, words to the left: the first column, and the last one if told so. */
function columns(rows: string[][], { words = false } = {}): string {
  const widths = rows[0]!.map((_, i) => Math.max(...rows.map((row) => row[i]!.length)));
  const isLeft = (i: number) => i === 0 || (words && i === widths.length - 1);
  const line = (row: string[]) => row.map((cell, i) => isLeft(i) ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!));
  return rows.map((row) => line(row).join("  ").trimEnd()).join("\n");
}

const spread = (values: number[]) =>
  `${Math.round(quantile(values, 0.05))}-${Math.round(quantile(values, 0.95))} ms (median ${
    Math.round(quantile(values, 0.5))
  })`;
const three = (label: string) => ["50", "95", "99"].map((q) => `${label} p${q}`);

/** The tables. */
export function report(results: readonly Result[], seed: number | string, silenceMs = SILENCE_MS): string {
  const capable = results.filter(({ pair }) => pair.isCapable);
  const possible = results.filter(({ pair }) => pair.isPossible);
  const rows = summarize(results);
  const mix = columns([
    ["class", "%", "mapping", "filter", "ports", "hairpin", "idle s", "basis"],
    ...MIX.map(({ name, percent, mapping, filtering, allocation, hairpin, idle, basis, blocked }) => [
      ...[name.padEnd(14), `${Math.round(percent * 100) / 100}`],
      ...blocked ? ["", "", "", "", ""] : [mapping, filtering, allocation, `${hairpin} %`],
      ...blocked ? [] : [idle.length > 1 ? "10-200" : idle[0]!.slice(1).join("-").replace(/^(\d+)-\1$/, "$1")],
      basis,
    ]),
  ], { words: true });
  const main = columns([
    ["", "direct: all", "UDP pairs", "in 60 s", "delivered: all", "UDP pairs", "message p50", "p95", "p99", "datagrams"]
      .concat("p50", "p95"),
    ...rows.map((row) => [
      row.name,
      ...[row.directOfAll, row.directOfCapable, row.everOfCapable, row.deliveredOfAll, row.deliveredOfCapable].map(
        percent,
      ),
      ...row.message.map(ms),
      ...row.datagrams.map((count) => Math.round(count).toLocaleString("en")),
    ]),
  ]);
  const times = columns([
    ["ms to a direct path", ...three("UDP pairs"), ...three("direct ones")],
    ...rows.map((row) => [row.name, ...row.direct.map(ms), ...row.directOfDirect.map(ms)]),
  ]);

  const isDirect = ({ run }: Result) => run.directMs <= JUDGED_MS;
  const cells = new Map<string, Result[]>();
  for (const one of possible) {
    const [a, b] = one.pair.sites.map(({ kind }) => kind.name);
    const key = `${a} -> ${b}${one.pair.place === "core" ? "" : ` (same ${one.pair.place})`}`;
    cells.set(key, [...cells.get(key) ?? [], one]);
  }
  const failed = [...cells].map(([key, all]) => ({ key, all, bad: all.filter((one) => !isDirect(one)) }))
    .filter(({ bad }) => bad.length > 0).sort((a, b) => b.bad.length - a.bad.length);
  const lost = results.filter(({ pair, run }) => pair.isCapable && (!run.isIn || run.delivered < run.sent));
  const twice = results.filter(({ run }) => run.duplicates > 0);
  const numbers = (of: Result[]) => of.slice(0, 12).map(({ pair }) => pair.index).join(" ");
  const fails = columns([
    ["caller -> called", "calls", "not direct", "late", "pairs"],
    ...failed.map(({ key, all, bad }) => [
      ...[key, `${all.length}`, `${bad.length}`, `${bad.filter(({ run }) => run.directMs < Infinity).length}`],
      numbers(bad),
    ]),
  ], { words: true });

  const forgot = capable.filter(({ run }) => run.isIn && run.backMs >= 0), again = forgot.filter(isDirect);
  const long = capable.filter(({ run }) => run.long > 0 && isDirect({ run } as Result));
  const told = long.reduce((sum, { run }) => sum + run.long, 0);
  const directly = long.reduce((sum, { run }) => sum + run.direct, 0);
  const sent = capable.reduce((sum, { run }) => sum + run.sent, 0);
  const arrived = capable.reduce((sum, { run }) => sum + run.delivered, 0);
  const count = (of: readonly unknown[]) => of.length.toLocaleString("en");
  return `The mix, in % of users

${mix}

${count(results)} pairs, seed ${seed}: ${count(capable)} where both have UDP, ${
    count(possible)
  } where theory knows a way.
R ${spread(results.map(({ pair }) => pair.r[0]))}, D ${spread(results.map(({ pair }) => pair.d))}.
Called ${
    silenceMs / 1_000
  } s after the login, direct within 15 s of the call; "punch" is the real server and client, the others are models.

${main}

The ${
    count(results.filter(({ pair }) => !pair.isCapable))
  } pairs with a UDP-blocked side cannot be delivered by what speaks UDP only: neither punch nor hyperdht
does; ICE (TURN over TCP), Tailscale (DERP) and frp (stcp) do, which is why their column says 100 %.

${times}

Theory: ${percent(limit())} of UDP-capable pairs of two sites; published sums: ${
    MODELS.map((model) => `${model.name} ${percent(headline(model))}`).join(", ")
  }.
Of the ${count(possible)} possible pairs here ${percent(share(possible, isDirect))} were direct in time; ${
    count(results.filter((one) => isDirect(one) && !one.pair.isPossible))
  } of the others were as well.
Messages between UDP-capable users: ${arrived.toLocaleString("en")} of ${sent.toLocaleString("en")} delivered, ${
    count(twice)
  } pairs with a duplicate.
NATs that forgot in mid-session, of direct paths: ${count(again)}; direct again p50 ${
    ms(quantile(again.map(({ run }) => run.backMs), 0.5))
  }, p95 ${ms(quantile(again.map(({ run }) => run.backMs), 0.95))} ms; slowest message ${
    ms(Math.max(0, ...again.map(({ run }) => run.slowestMs)))
  } ms.
Conversations of ${LONG_MESSAGES * LONG_EVERY_MS / 1_000} s: ${count(long)}; ${
    percent(directly / told)
  } of their messages came directly, slowest p50 ${ms(quantile(long.map(({ run }) => run.slowestMs), 0.5))}, p99 ${
    ms(quantile(long.map(({ run }) => run.slowestMs), 0.99))
  } ms.

Possible, but not direct within 15 s (late: within 60 s)

${failed.length > 0 ? fails : "none"}

Not delivered, of UDP-capable pairs: ${lost.length > 0 ? numbers(lost) : "none"}${
    twice.length > 0 ? `\nDelivered twice: ${numbers(twice)}` : ""
  }`;
}

const hostOf = (endpoint: string) => endpoint.replace(/:\d+$/, "");

/** What happened to one pair, and when. */
function explain(seed: number | string, index: number, silenceMs: number): string {
  const pair = drawPair(seed, index), lines: string[] = [];
  const fates = new Map<string, number>();
  let players: [Player, Player] | null = null;
  const watch = (world: World, both: [Player, Player]) => {
    players = both;
    world.net.trace = ({ fate, node, host, from, to }) => {
      const away: Fate[] = ["filtered", "unmapped", "no-port", "no-hairpin", "no-route", "lost", "ttl", "no-socket"];
      const what = away.includes(fate) ? `${fate} at ${node}: ${host} ${hostOf(from)} -> ${hostOf(to)}` : "";
      if (what) fates.set(what, (fates.get(what) ?? 0) + 1);
    };
  };
  const run = runPair(seed, pair, { silenceMs, watch });
  const calledAt = players![0].events("sent")[0];
  const start = calledAt ? calledAt.at - calledAt.ms : 0;
  for (const player of players!) {
    for (const { at, event } of player.process.events) {
      lines.push(
        `${Math.round(at - start).toString().padStart(8)}  ${player.name.padEnd(5)}  ${JSON.stringify(event)}`,
      );
    }
  }
  lines.sort((one, other) => parseInt(one) - parseInt(other));
  return [
    JSON.stringify(pair, null, 2),
    ...lines,
    ...[...fates].map(([what, count]) => `${`${count}`.padStart(8)}  ${what}`),
    JSON.stringify(run, (_, value) => value === Infinity ? "never" : value),
  ].join("\n");
}

// ---------------------------------------------------------------------------------------------------- the picture

const COLOURS = ["#2f81f7", "#d1732a", "#3a9d5d", "#a371d4", "#b8578a"];
const GREY = "#808080";
const WIDTH = 760, LEFT = 56, RIGHT = 740, TOP = 44, BOTTOM = 320, FROM_MS = 50, TO_MS = 60_000, POINTS = 140;

/** Cumulative share of UDP-capable pairs that are direct, over the time since the call; under it bars that are its legend. */
export function picture(results: readonly Result[]): string {
  const capable = results.filter(({ pair }) => pair.isCapable), rows = summarize(results);
  const x = (at: number) => LEFT + (RIGHT - LEFT) * Math.log(at / FROM_MS) / Math.log(TO_MS / FROM_MS);
  const y = (part: number) => BOTTOM - (BOTTOM - TOP) * part;
  const line = (i: number, key: "directMs" | "messageMs") => {
    const times = capable.map(({ outcomes }) => outcomes[i]![key]).sort((a, b) => a - b);
    const points: [string, string][] = [];
    for (let step = 0, reached = 0; step <= POINTS; step++) {
      const at = FROM_MS * (TO_MS / FROM_MS) ** (step / POINTS);
      while (reached < times.length && times[reached]! <= at) reached++;
      points.push([x(at).toFixed(1), y(reached / times.length).toFixed(1)]);
    }
    const bends = points.filter(([, height], i) => height !== points[i - 1]?.[1] || height !== points[i + 1]?.[1]);
    return bends.join(" ");
  };
  const text = (left: number, top: number, words: string, more = "") =>
    `<text x="${left}" y="${top}"${more}>${words}</text>`;
  const parts = [text(LEFT, 22, "Direct after the call: share of pairs with UDP on both sides", ` class="title"`)];
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(`<path class="grid" d="M${LEFT} ${y(part)}H${RIGHT}" />`);
    parts.push(text(LEFT - 8, y(part) + 4, `${100 * part} %`, ` text-anchor="end"`));
  }
  for (
    const [at, words] of [[50, "50 ms"], [100, "100"], [200, "200"], [500, "500"], [1_000, "1 s"], [
      2_000,
      "2",
    ]] as const
  ) {
    parts.push(`<path class="grid" d="M${x(at).toFixed(1)} ${TOP}V${BOTTOM}" />`);
    parts.push(text(Math.round(x(at)), BOTTOM + 18, words, ` text-anchor="middle"`));
  }
  for (const [at, words] of [[5_000, "5"], [15_000, "15"], [60_000, "60 s"]] as const) {
    parts.push(`<path class="grid" d="M${x(at).toFixed(1)} ${TOP}V${BOTTOM}" />`);
    parts.push(text(Math.round(x(at)), BOTTOM + 18, words, ` text-anchor="middle"`));
  }
  parts.push(`<polyline stroke="${COLOURS[0]}" stroke-dasharray="3 4"\n    points="${line(0, "messageMs")}" />`);
  for (let i = SYSTEMS.length - 1; i >= 0; i--) {
    parts.push(
      `<polyline stroke="${COLOURS[i]}"${i === 0 ? ` class="ours"` : ""}\n    points="${line(i, "directMs")}" />`,
    );
  }
  const bars = BOTTOM + 62, barLeft = 176, barWidth = 330;
  parts.push(text(LEFT, bars - 14, "Direct within 15 s", ` class="head"`));
  parts.push(text(barLeft + barWidth + 70, bars - 14, "direct, median", ` class="head"`));
  for (const [i, row] of rows.entries()) {
    const top = bars + 24 * i, colour = COLOURS[i]!;
    parts.push(text(LEFT, top + 12, row.name, i === 0 ? ` class="head"` : ""));
    parts.push(
      `<rect x="${barLeft}" y="${top}" width="${
        (barWidth * row.directOfCapable).toFixed(1)
      }" height="15" rx="2" fill="${colour}" />`,
    );
    parts.push(text(barLeft + barWidth + 8, top + 12, percent(row.directOfCapable)));
    parts.push(text(barLeft + barWidth + 70, top + 12, `${ms(row.direct[0]!)} ms`));
  }
  const end = bars + 24 * rows.length,
    notes = [
      `Dashed: the first message has arrived. ${results.length.toLocaleString("en")} pairs drawn from published shares`,
      "of NATs, 1 % loss. punch is measured, the real client and server in a simulated internet;",
      "the others are models of their constants.",
    ];
  for (const [i, note] of notes.entries()) parts.push(text(LEFT, end + 16 + 16 * i, note));
  const height = end + 62;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img">
  <title>Share of pairs of users that have a direct path, over the time since the call</title>
  <style>
  text {
    font: 12px system-ui, sans-serif;
    fill: ${GREY};
  }
  .title {
    font-size: 15px;
    font-weight: 600;
  }
  .head {
    font-weight: 600;
  }
  .grid {
    stroke: ${GREY};
    stroke-opacity: 0.3;
  }
  polyline {
    fill: none;
    stroke-width: 2;
    stroke-linejoin: round;
  }
  .ours {
    stroke-width: 3;
  }
  </style>
${parts.map((part) => `  ${part}\n`).join("")}</svg>
`;
}

// ---------------------------------------------------------------------------------------------------- command line

/** Infinity does not survive JSON. */
const toLine = (index: number, run: Run) =>
  JSON.stringify([index, run], (_, value) => value === Infinity ? "never" : value);
const fromLine = (line: string): [number, Run] => JSON.parse(line, (_, value) => value === "never" ? Infinity : value);

interface Draw {
  pairs: number;
  seed: string;
  silenceMs: number;
}

/** All pairs, in as many processes of this runtime as there are processors. */
async function everywhere({ pairs, seed, silenceMs }: Draw): Promise<Result[]> {
  const workers = Math.min(availableParallelism(), Math.ceil(pairs / 100)), results: Result[] = [];
  const began = performance.now();
  await Promise.all(Array.from({ length: workers }, async (_, first) => {
    const runtime = "Deno" in globalThis ? ["run", "-A"] : [];
    const orders = { pairs, seed, silence: silenceMs / 1_000, first, step: workers };
    const args = Object.entries(orders).flatMap(([name, value]) => [`--${name}`, `${value}`]);
    const env = { ...process.env, DENO_NO_UPDATE_CHECK: "1" };
    const command = [...runtime, fileURLToPath(import.meta.url), ...args];
    const child = spawn(process.execPath, command, { env, stdio: ["ignore", "pipe", "inherit"] });
    const ended = new Promise((resolve) => child.on("close", (code, signal) => resolve(signal ?? code)));
    for await (const line of createInterface({ input: child.stdout })) {
      results.push(result(seed, ...fromLine(line)));
      if (results.length % 1_000 === 0) {
        process.stderr.write(
          `${results.length} of ${pairs} after ${Math.round((performance.now() - began) / 1_000)} s\n`,
        );
      }
    }
    const code = await ended;
    if (code !== 0) throw new Error(`A process ended with ${code}`);
  }));
  return results.sort((one, other) => one.pair.index - other.pair.index);
}

async function main(): Promise<void> {
  const { parseArgs } = await import("deno-std@1.4.0/cli/parse_args.js");
  const { pairs, seed, pair, silence, first, step } = parseArgs(process.argv.slice(2), {
    string: ["pairs", "seed", "pair", "silence", "first", "step"],
    default: { pairs: "20000", seed: "1", silence: `${SILENCE_MS / 1_000}` },
    unknown: (arg: string) => {
      console.error(`Unknown argument "${arg}": see the top of ${fileURLToPath(import.meta.url)}`);
      process.exit(2);
    },
  });
  const draw: Draw = { pairs: Number(pairs), seed, silenceMs: 1_000 * Number(silence) };
  if (step !== undefined) { // one process of several
    for (let index = Number(first); index < draw.pairs; index += Number(step)) {
      console.log(toLine(index, attempt(seed, index, draw.silenceMs)));
    }
  } else if (pair !== undefined) console.log(explain(seed, Number(pair), draw.silenceMs));
  else {
    const began = performance.now();
    const results = await everywhere(draw);
    console.log(report(results, seed, draw.silenceMs));
    if (results.length >= PICTURE_PAIRS && draw.silenceMs === SILENCE_MS) {
      writeFileSync(fileURLToPath(new URL("population.svg", import.meta.url).href), picture(results));
    }
    console.log(`\n${Math.round((performance.now() - began) / 1_000)} s`);
  }
}

if (import.meta.main) await main();
