/**
 * How often, how fast and at what cost two users drawn at random become direct: the real machines of server.ts and
 * client.ts behind pairs of NATs drawn from what is published about the world's, in the simulated internet and under
 * virtual time; beside them, over the very same pairs, small models of four well-known systems.
 *
 *     draw two users ---> a world of their own: NATs, R, D, 1 % loss ---> login, 3 s, call, 15 s to become direct
 *          |                                                              messages, a mapping that changes, silence
 *          +------------> ICE, Tailscale, hyperdht, frp: their published constants over the same classes, R and D
 *
 *     deno run -A lab/population.ts [PAIRS] [SEED]         the tables, and (10,000 or more) lab/population.svg
 *     deno run -A lab/population.ts 1 SEED PAIR            one pair: its NATs and what happened when
 *     SILENCE=123 deno run -A lab/population.ts 6000       called after so many seconds without a word, not after 3
 *
 * Sources, as in the notes that the numbers were collected in: [G] is a guess, [D] derived. Papers by name: Ford (USENIX
 * 2005), Richter (IMC 2016), Halkes (2011), Hatonen (IMC 2010), RFC 9308. The shares of the classes are as uncertain as
 * their sources, so what fails is told per pair of classes, not only as a sum. IPv4 only, no port mapping.
 *
 * @module
 */
import { spawn } from "node:child_process";
import { writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { type Fate, type Filtering, linux, type Mapping, type Nat, type NatOptions, random } from "./network.ts";
import { createWorld, DELAY_MS, join, type Player, type World } from "./scenario.ts";

// ---------------------------------------------------------------------------------------------------- constants

const PAIRS = 20_000;
/** Fewer pairs do not replace the picture. */
const PICTURE_PAIRS = 10_000;
/** Access line, one way, uniform: a fibre at 5, a phone on a bad day at 60 [G]. */
const ACCESS_MS = [5, 60] as const;
/** Of the access delay of a carrier's subscriber so much lies behind the carrier's NAT [G]. */
const CARRIER_MS = 5;
/** On the core, per datagram: what the published mix asks for. */
const LOSS = 0.01, JITTER_MS = 10;
/**
 * After both are in and before the call: as two people need; the NATs are classified by then. With SILENCE=123 in the
 * environment so many seconds: then mappings have died that a keepalive every 20 s does not hold.
 */
const BEFORE_CALL_MS = 1_000 * Number(process.env["SILENCE"] ?? 3);
/** Direct by then, or counted as relayed; and, for those who are late, whether they ever become direct. */
const JUDGED_MS = 15_000, EVER_MS = 60_000;
/** Both users behind one NAT [mix]; of those at a carrier a third meet at the carrier's NAT only [G]. */
const SAME_NAT = 0.03, SAME_CARRIER = 1 / 3;
/** A mobile carrier that keeps its subscribers from each other: every other one [G]. */
const ISOLATED = 0.5;
/** EIM+APDF routers whose INPUT chain accepts: hotspots, Docker and VM hosts; share [G]. */
const INPUT_ACCEPT = 0.15;
/** A NAT that forgets in mid-session [mix]. */
const FORGETS = 0.03;
/** Conversations that go on, to see what becomes of paths: so many of them, a message every so often [G]. */
const LONG = 0.05, LONG_MESSAGES = 15, LONG_EVERY_MS = 12_000;
/** Connection tracking of a router, and ports of a subscriber [mix]. */
const MAX_MAPPINGS = 4_096, QUOTAS = [512, 1_024, 2_048, 4_096] as const;

// ---------------------------------------------------------------------------------------------------- the mix

/** Shares in percent, and between how many seconds of silence a mapping dies. */
type Idle = readonly (readonly [percent: number, low: number, high: number])[];

/** Under 30, 60, 120 s: 40, 85, 95 % and 20, 48, 85 % [G], fitted to Richter's medians, 35 and 65 s, within 10-200 s. */
const FIXED_IDLE: Idle = [[40, 10, 30], [45, 30, 60], [10, 60, 120], [5, 120, 200]];
const CELLULAR_IDLE: Idle = [[20, 10, 30], [28, 30, 60], [37, 60, 120], [15, 120, 200]];

/** A class of users. */
export interface Kind {
  name: string;
  percent: number;
  mapping: Mapping;
  filtering: Filtering;
  allocation: "preserving" | "sequential" | "random" | "block";
  hairpin: number; // percent of them
  idle: Idle;
  basis: string;
  linux?: "accept" | "drop";
  carrier?: "fixed" | "cellular"; // fixed: a home router stands before the carrier's NAT
  absolute?: number; // percent of them whose mappings die after 60 s, whatever the traffic (iroh#4424)
  foreignRate?: number; // neighbours' flows per second, which take ports of a sequence [G]
  blocked?: boolean;
}

const eim = { mapping: "EIM", allocation: "preserving", hairpin: 24 } as const; // hairpin: Ford, 80 of 335
const apdm = { mapping: "APDM", filtering: "APDF", hairpin: 0 } as const;
const FIXED = "10 % of users behind a fixed carrier NAT [G], of those 11 % EDM (Richter)";
const CELLULAR = "20 % of users on phones [G], of those 40 % EDM (Richter)";

/** The mix, in percent of users. The filters' split is [G] everywhere: no recent survey is known. */
export const MIX: readonly Kind[] = [
  {
    ...{ ...eim, name: "open", percent: 6, filtering: "APDF", hairpin: 0, idle: [[100, 120, 120]] },
    basis: "a firewall or a 1:1 NAT; Halkes: 21 % in 2010, lowered [G]",
  },
  {
    ...{ ...eim, name: "Linux", percent: 41 * (1 - INPUT_ACCEPT), filtering: "APDF", linux: "drop" },
    ...{ idle: [[100, 120, 120]], basis: "home routers; Richter: under 2 % EDM; Linux: 30 s, replied 120 s" },
  },
  {
    ...{ ...eim, name: "Linux accept", percent: 41 * INPUT_ACCEPT, filtering: "APDF", linux: "accept" },
    ...{ idle: [[100, 120, 120]], basis: "15 % of them [G]" },
  },
  { ...eim, name: "home ADF", percent: 5, filtering: "ADF", idle: [[100, 60, 180]], basis: "[G]" },
  {
    ...{ ...eim, name: "full cone", percent: 6, filtering: "EIF", hairpin: 50, idle: [[100, 300, 300]] },
    basis: "[G]",
  },
  {
    ...{ ...apdm, name: "pf", percent: 0.5, allocation: "random", idle: [[100, 30, 60]] },
    basis: "Richter: under 2 % of homes EDM",
  },
  {
    ...{ ...apdm, name: "home +1/+2", percent: 0.5, allocation: "sequential", idle: [[100, 60, 60]] },
    ...{ foreignRate: 0.5, basis: "[G]; EasyTier and frp exist for it" },
  },
  // The class is that of both NATs together, so the home router before this one filters nothing either.
  {
    ...{ ...eim, name: "CGN EIF", percent: 4, filtering: "EIF", allocation: "block", hairpin: 30 },
    ...{ carrier: "fixed", idle: FIXED_IDLE, basis: FIXED },
  },
  {
    ...{ ...eim, name: "CGN APDF", percent: 5, filtering: "APDF", allocation: "block", hairpin: 30 },
    ...{ carrier: "fixed", idle: FIXED_IDLE, basis: FIXED },
  },
  {
    ...{ ...apdm, name: "CGN APDM", percent: 1, allocation: "block", carrier: "fixed" },
    ...{ idle: FIXED_IDLE, basis: FIXED },
  },
  {
    ...{ ...eim, name: "phone EIF", percent: 3, filtering: "EIF", allocation: "block", hairpin: 0 },
    ...{ carrier: "cellular", idle: CELLULAR_IDLE, basis: CELLULAR },
  },
  {
    ...{ ...eim, name: "phone APDF", percent: 9, filtering: "APDF", allocation: "random", hairpin: 0 },
    ...{ carrier: "cellular", idle: CELLULAR_IDLE, basis: CELLULAR },
  },
  {
    ...{ ...apdm, name: "phone APDM", percent: 5.5, allocation: "random", carrier: "cellular" },
    ...{ absolute: 20, idle: CELLULAR_IDLE, basis: `${CELLULAR}; 1 in 5 absolute 60 s [G]` },
  },
  {
    ...{ ...apdm, name: "phone block", percent: 2, allocation: "block", carrier: "cellular" },
    ...{ idle: CELLULAR_IDLE, basis: "[G]" },
  },
  {
    ...{ ...apdm, name: "phone +1/+2", percent: 0.5, allocation: "sequential", carrier: "cellular" },
    ...{ foreignRate: 2, idle: CELLULAR_IDLE, basis: "[G]" },
  },
  {
    ...{ ...apdm, name: "office", percent: 5, allocation: "random", idle: [[100, 120, 350]] },
    basis: "corporate and cloud NATs, presets of patchbay; share [G]",
  },
  {
    ...{ ...apdm, name: "office +1/+2", percent: 1, allocation: "sequential", idle: [[100, 120, 350]] },
    ...{ foreignRate: 5, basis: "the same" },
  },
  {
    ...{ ...eim, name: "no UDP", percent: 5, filtering: "APDF", hairpin: 0, idle: [[100, 120, 120]], blocked: true },
    basis: "RFC 9308 section 2: 3 to 5 % of networks, upper value",
  },
];

const isHard = (kind: Kind) => kind.mapping !== "EIM";
const isSequence = (kind: Kind) => kind.allocation === "sequential";
const isAdmitting = (kind: Kind) => kind.filtering !== "APDF";

/** Of two NATs: all but two symmetric ones of which one gives random ports, where the odds are quadratic. */
const canPunch = (one: Kind, other: Kind) => !(isHard(one) && isHard(other)) || (isSequence(one) && isSequence(other));

// ---------------------------------------------------------------------------------------------------- drawing

/** A user: the NATs between him and the core, outermost first. */
interface Site {
  kind: Kind;
  accessMs: number;
  nats: NatOptions[];
  lan: string;
}

/** Two users: the first one calls. */
export interface Pair {
  index: number;
  sites: [Site, Site];
  /** Where their ways meet: on the core, at the same router, or at the carrier they share. */
  place: "core" | "router" | "carrier";
  isolated: boolean; // by that carrier
  isCapable: boolean; // both have UDP
  isPossible: boolean; // theory knows a way
  /** Round trips in ms: from each to the server, and from one to the other. */
  r: [number, number];
  d: number;
  forgets: boolean;
  isLong: boolean;
}

type Chance = () => number;
const between = (next: Chance, [low, high]: readonly [number, number]) => low + next() * (high - low);
const among = <T>(next: Chance, items: readonly T[]) => items[Math.floor(next() * items.length)]!;

/** One of those that have a share of 100 %. */
function weighted<T>(next: Chance, items: readonly T[], percent: (item: T) => number): T {
  let left = next() * 100;
  return items.find((item) => (left -= percent(item)) < 0) ?? items.at(-1)!;
}

function drawNats(kind: Kind, next: Chance): NatOptions[] {
  const { mapping, filtering, allocation, foreignRate = 0 } = kind;
  const [, low, high] = weighted(next, kind.idle, ([percent]) => percent);
  const lifetimeMs = between(next, [low, high]) * 1_000;
  const quota = among(next, QUOTAS);
  const hairpin = next() * 100 < kind.hairpin;
  const isAbsolute = next() * 100 < (kind.absolute ?? 0), step = next() < 0.5 ? 1 : 2;
  const accepts = next() < INPUT_ACCEPT, isNat = next() < 0.5;
  const nat: NatOptions = {
    ...{ mapping, filtering, hairpin, lifetimeMs, allocation: allocation === "block" ? { block: quota } : allocation },
    ...kind.carrier ? { quota } : { maxMappings: MAX_MAPPINGS },
    ...isSequence(kind) ? { step, foreignRate } : {},
    ...isAbsolute ? { absoluteLifetimeMs: 60_000 } : {},
  };
  if (kind.linux) return [{ ...linux(kind.linux), hairpin, maxMappings: MAX_MAPPINGS }];
  if (kind.name === "open") return [isNat ? nat : { ...nat, firewall: true }];
  if (kind.carrier !== "fixed") return [nat];
  const cone = { mapping: "EIM", filtering: "EIF", allocation: "preserving", lifetimeMs: 300_000 } as const;
  return [nat, { ...kind.filtering === "EIF" ? cone : linux(accepts ? "accept" : "drop"), maxMappings: MAX_MAPPINGS }];
}

/** A pair depends on the seed and its own number alone. */
export function drawPair(seed: number | string, index: number): Pair {
  const next = random(`${seed} pair ${index}`);
  const site = (kind = weighted(next, MIX, ({ percent }) => percent)): Site => {
    const accessMs = Math.round(between(next, ACCESS_MS) * 10) / 10;
    // Two homes as a rule use the same few networks.
    const home = `192.168.${among(next, [0, 1, 1, 178])}.${2 + Math.floor(next() * 250)}`;
    return { kind, accessMs, nats: drawNats(kind, next), lan: home };
  };
  const one = site(), isSame = next() < SAME_NAT, atCarrier = next() < SAME_CARRIER, isolated = next() < ISOLATED;
  const drawn = site(isSame ? one.kind : undefined);
  const place = !isSame ? "core" : one.kind.carrier && atCarrier ? "carrier" : "router";
  const other = place === "core"
    ? drawn
    : place === "router"
    ? { ...one, lan: one.lan.replace(/\d+$/, (last) => `${Number(last) + 1}`) }
    : { ...drawn, nats: [one.nats[0]!, ...drawn.nats.slice(1)] };
  const sites: [Site, Site] = [one, other];
  const outside = place === "router" ? 0 : place === "carrier" ? -2 * CARRIER_MS : 0;
  const isCapable = !one.kind.blocked && !other.kind.blocked;
  const isPossible = isCapable &&
    (place === "router" ||
      (place === "core"
        ? canPunch(one.kind, other.kind)
        : one.kind.carrier === "cellular"
        ? !isolated
        : !isHard(one.kind) && one.nats[0]!.hairpin === true));
  return {
    ...{ index, sites, place, isCapable, isPossible, isolated: isolated && one.kind.carrier === "cellular" },
    r: [2 * (one.accessMs + DELAY_MS), 2 * (other.accessMs + DELAY_MS)],
    d: place === "router" ? 1 : 2 * (one.accessMs + other.accessMs + outside),
    forgets: next() < FORGETS,
    isLong: next() < LONG,
  };
}

// ---------------------------------------------------------------------------------------------------- the real machines

/** What a system made of a pair; times in ms since the call, Infinity for never. */
export interface Outcome {
  messageMs: number; // the first message is there
  directMs: number; // both sides have a direct path
  datagrams: number; // that the two have sent until then, or until JUDGED_MS
}

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

/** Runs the real machines over a pair. `watch` is told everything, for one pair that is to be understood. */
export function runPair(
  seed: number | string,
  pair: Pair,
  watch?: (world: World, players: [Player, Player]) => void,
): Run {
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
  net.run(BEFORE_CALL_MS);
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

// ---------------------------------------------------------------------------------------------------- the others

/** Somebody else's system, by its constants. */
export interface Model {
  name: string;
  /** Of one attempt between two UDP-capable classes, without loss and INPUT accept: as the published sums were made. */
  odds(one: Kind, other: Kind): number;
  simulate(pair: Pair, next: Chance): Outcome;
  /** Does a message arrive without a direct path: a relay, over TCP where UDP is blocked. */
  hasRelay: boolean;
}

/** One way; what is lost is sent again by a timer. */
function leg(next: Chance, ms: number, retryMs: number): number {
  let late = 0;
  while (next() < LOSS) late += retryMs;
  return late + ms + next() * JITTER_MS;
}
const trip = (next: Chance, ms: number, retryMs: number) => leg(next, ms / 2, retryMs) + leg(next, ms / 2, retryMs);

const isPlain = (one: Kind, other: Kind) => !isHard(one) && !isHard(other);
/** One is symmetric, and the other's filter lets its packets in, whose port is learnt from them ("peer reflexive"). */
const isReflexive = (one: Kind, other: Kind) => isHard(one) !== isHard(other) && isAdmitting(isHard(one) ? other : one);
const plainOdds = (one: Kind, other: Kind) => isPlain(one, other) || isReflexive(one, other) ? 1 : 0;

/** What the classes say, unless the two share a place. */
function succeeds(
  { odds }: Pick<Model, "odds">,
  { sites: [one, other], place, isPossible, isCapable }: Pair,
  u: number,
) {
  return isCapable && (place === "core" ? u < odds(one.kind, other.kind) : isPossible);
}

/** The earlier packet of the peer spoils an accepting router's mapping: the new port is not admitted by a strict filter. */
const spoils = ({ sites, place }: Pair, early: number, late: number) =>
  place === "core" && sites[late]!.kind.linux === "accept" && !isAdmitting(sites[early]!.kind);

const never = { messageMs: Infinity, directMs: Infinity };
/** Ports that a spray draws from: 1024 to 65535 (hyperdht from 1000). */
const SPRAYED_PORTS = 64_512;

/** ICE with trickle and TURN, libnice's timing: Ta 20 ms, RTO 500 ms doubling, 7 transmissions (RFC 8445, RFC 8489). */
const ice: Model = {
  name: "ICE (libnice)",
  hasRelay: true,
  odds: plainOdds,
  simulate(pair, next) {
    const l = pair.r[0] + pair.r[1], signalled = trip(next, l, 200); // offer and answer through the application's server
    const isDirect = succeeds(ice, pair, next()) && !spoils(pair, 1, 0); // the called side begins to check earlier
    const checked = signalled + 20 + trip(next, pair.d, 500);
    const directMs = isDirect ? checked + trip(next, pair.d, 500) : Infinity; // and the nomination
    const relayMs = signalled + 60 + 2 * trip(next, l, 500);
    const tries = [0, 500, 1_500, 3_500, 7_500].filter((at) => at < Math.min(directMs - signalled, JUDGED_MS)).length;
    return { messageMs: Math.min(directMs, relayMs), directMs, datagrams: 8 + 2 * 3 * tries + (isDirect ? 6 : 8) };
  },
};

/** Tailscale: DERP at once, disco pings to all endpoints each 5 s, CallMeMaybe; WireGuard not yet shaken hands. */
const tailscale: Model = {
  name: "Tailscale",
  hasRelay: true,
  odds: plainOdds,
  simulate(pair, next) {
    const l = pair.r[0] + pair.r[1];
    const isDirect = succeeds(tailscale, pair, next()) && !spoils(pair, 0, 1); // the caller pings before B knows
    // B's answer to the WireGuard handshake has B call too, so A pings again: L + D. A lost ping waits for the next 5 s.
    const directMs = isDirect ? trip(next, l, 200) + trip(next, pair.d, 5_000) : Infinity;
    const rounds = 1 + Math.floor(Math.min(directMs, JUDGED_MS) / 5_000);
    return { messageMs: 1.5 * l + next() * JITTER_MS, directMs, datagrams: 6 + 2 * 2 * rounds + (isDirect ? 4 : 0) };
  },
};

/** hyperdht 6: three exchanges over a DHT node; 256 sockets x 1,750 ports at 20 ms, with repeats, no relay of its own. */
const hyperdht: Model = {
  name: "hyperdht",
  hasRelay: false,
  odds: (one, other) =>
    isHard(one) && isHard(other)
      ? 0
      : isPlain(one, other) || isReflexive(one, other)
      ? 1
      : 1 - (1 - 256 / (65_536 - 1_000)) ** 1_750,
  simulate(pair, next) {
    const [one, other] = pair.sites, l = pair.r[0] + pair.r[1];
    if (!succeeds(hyperdht, pair, 0)) return { ...never, datagrams: 40 };
    const ready = trip(next, pair.r[0], 1_000) + 3 * trip(next, l, 1_000); // lookup, handshake, two rounds: 7 R
    if (pair.place !== "core" || isPlain(one.kind, other.kind)) {
      const at = ready + leg(next, pair.d / 2, 1_000); // 10 tries, a second apart; TTL 5 first, so nothing is spoilt
      return { messageMs: at, directMs: at, datagrams: 44 };
    }
    const hit = Math.ceil(Math.log(1 - next()) / Math.log(1 - 256 / (65_536 - 1_000)));
    // Where a filter admits the symmetric side, its second round of the 256 sockets, with a usual TTL, gets in.
    const probes = isReflexive(one.kind, other.kind) ? Math.min(hit, 256) : hit;
    const at = probes > 1_750 ? Infinity : ready + 100 + 20 * probes + pair.d / 2;
    const sent = Math.min(probes, 1_750, (JUDGED_MS - ready) / 20);
    return { messageMs: at, directMs: at, datagrams: Math.round(40 + 256 + 2 * sent) };
  },
};

/** frp xtcp: two STUN queries, a second of sleep, one packet per address and attempt, next one after 10 s; 256 x 1,000. */
const frp: Model = {
  name: "frp xtcp",
  hasRelay: true, // fallbackTo stcp
  odds: (one, other) =>
    isPlain(one, other)
      ? 0.97 // its packets are sent once
      : isReflexive(one, other)
      ? 1
      : isHard(one) && isHard(other)
      ? isSequence(one) && isSequence(other) ? 0.7 : 0
      : isSequence(one) || isSequence(other)
      ? 0.97 // a window of the last port +-10
      : 0.98,
  simulate(pair, next) {
    const [one, other] = [pair.sites[0].kind, pair.sites[1].kind], l = pair.r[0] + pair.r[1];
    const begun = 3 * trip(next, pair.r[0], 500) + leg(next, l / 2, 200) + 1_000;
    const passed = () => trip(next, pair.d, 1_000) + leg(next, pair.d, 1_000); // the hole, then QUIC's handshake
    const fallback = 1_000 + 1.5 * l; // fallbackTimeoutMs
    const isSpray = pair.place === "core" && isHard(one) !== isHard(other) && !isSequence(one) && !isSequence(other) &&
      !isReflexive(one, other);
    let directMs = Infinity, datagrams = 20;
    if (isSpray && pair.isCapable) {
      const probes = Math.ceil(SPRAYED_PORTS * (1 - (1 - next()) ** (1 / 256))); // no repeats
      if (probes <= 1_000) directMs = begun + 3_000 + 15 * probes + passed();
      datagrams += 256 + Math.min(probes, 1_000);
    } else if (!isSpray && succeeds(frp, pair, 0)) {
      const accepts = one.linux === "accept" || other.linux === "accept"; // half of its scripts suit these [G]
      let attempt = 0;
      while (attempt < 6 && (!succeeds(frp, pair, next()) || (accepts && next() < 0.5))) attempt++;
      if (attempt < 6) directMs = begun + 10_000 * attempt + passed();
      datagrams += 6 * Math.min(attempt + 1, 2);
    }
    return { messageMs: Math.min(directMs, fallback), directMs, datagrams };
  },
};

/** The field. */
export const MODELS: readonly Model[] = [hyperdht, frp, ice, tailscale];

/** The share of UDP-capable pairs that a system passes, as published: the weighted sum over all pairs of classes. */
export function headline({ odds }: Pick<Model, "odds">): number {
  const capable = MIX.filter(({ blocked }) => !blocked);
  const all = capable.reduce((sum, { percent }) => sum + percent, 0);
  let share = 0;
  for (const one of capable) {
    for (const other of capable) share += one.percent * other.percent / all ** 2 * odds(one, other);
  }
  return share;
}

/** What theory allows. */
export const limit = (): number => headline({ odds: (one, other) => canPunch(one, other) ? 1 : 0 });

// ---------------------------------------------------------------------------------------------------- sums

/** One pair, and what each system made of it; first ours. */
export interface Result {
  pair: Pair;
  run: Run;
  outcomes: Outcome[];
}

/** Runs these pairs in this process. */
export function population(pairs: number, seed: number | string, { first = 0, step = 1 } = {}): Result[] {
  const results = [];
  for (let index = first; index < pairs; index += step) results.push(result(seed, index, attempt(seed, index)));
  return results;
}

/** An exception in a machine is a finding, and must not hide the other ones. */
function attempt(seed: number | string, index: number): Run {
  try {
    return runPair(seed, drawPair(seed, index));
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
export function report(results: readonly Result[], seed: number | string): string {
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
    BEFORE_CALL_MS / 1_000
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
function explain(seed: number | string, index: number): string {
  const pair = drawPair(seed, index), lines: string[] = [];
  const fates = new Map<string, number>();
  let players: [Player, Player] | null = null;
  const run = runPair(seed, pair, (world, both) => {
    players = both;
    world.net.trace = ({ fate, node, host, from, to }) => {
      const away: Fate[] = ["filtered", "unmapped", "no-port", "no-hairpin", "no-route", "lost", "ttl", "no-socket"];
      const what = away.includes(fate) ? `${fate} at ${node}: ${host} ${hostOf(from)} -> ${hostOf(to)}` : "";
      if (what) fates.set(what, (fates.get(what) ?? 0) + 1);
    };
  });
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
      `Dashed: the first message is there. ${results.length.toLocaleString("en")} pairs drawn from published shares`,
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

/** All pairs, in as many processes of this runtime as there are processors. */
async function everywhere(pairs: number, seed: string): Promise<Result[]> {
  const workers = Math.min(availableParallelism(), Math.ceil(pairs / 100)), results: Result[] = [];
  const began = performance.now();
  await Promise.all(Array.from({ length: workers }, async (_, first) => {
    const runtime = "Deno" in globalThis ? ["run", "-A"] : [];
    const args = [...runtime, fileURLToPath(import.meta.url), "--part", `${pairs}`, seed, `${first}`, `${workers}`];
    const env = { ...process.env, DENO_NO_UPDATE_CHECK: "1" };
    const child = spawn(process.execPath, args, { env, stdio: ["ignore", "pipe", "inherit"] });
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

if (import.meta.main) {
  const args = process.argv.slice(2);
  if (args[0] === "--part") {
    const [pairs, seed, first, step] = args.slice(1);
    for (let index = Number(first); index < Number(pairs); index += Number(step)) {
      console.log(toLine(index, attempt(seed!, index)));
    }
  } else {
    const [pairs = `${PAIRS}`, seed = "1", one] = args;
    if (one !== undefined) {
      console.log(explain(seed, Number(one)));
    } else {
      const began = performance.now();
      const results = await everywhere(Number(pairs), seed);
      console.log(report(results, seed));
      if (results.length >= PICTURE_PAIRS && BEFORE_CALL_MS === 3_000) {
        writeFileSync(fileURLToPath(new URL("population.svg", import.meta.url).href), picture(results));
      }
      console.log(`\n${Math.round((performance.now() - began) / 1_000)} s`);
    }
  }
}
