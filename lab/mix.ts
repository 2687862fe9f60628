/**
 * The world's NATs, by what is published about them: classes of users with their shares, and pairs drawn from them.
 *
 * Sources, as in the notes that the numbers were collected in: [G] is a guess, [D] derived. Papers by name: Ford (USENIX
 * 2005), Richter (IMC 2016), Halkes (2011), Hatonen (IMC 2010), RFC 9308. The shares of the classes are as uncertain as
 * their sources. IPv4 only, no port mapping.
 *
 * @module
 */
import { type Filtering, linux, type Mapping, type NatOptions, random } from "./network.ts";
import { DELAY_MS } from "./scenario.ts";

/** Access line, one way, uniform: a fibre at 5, a phone on a bad day at 60 [G]. */
const ACCESS_MS = [5, 60] as const;
/** Of the access delay of a carrier's subscriber so much lies behind the carrier's NAT [G]. */
export const CARRIER_MS = 5;
/** On the core, per datagram: what the published mix asks for. */
export const LOSS = 0.01, JITTER_MS = 10;
/** Both users behind one NAT [mix]; of those at a carrier a third meet at the carrier's NAT only [G]. */
const SAME_NAT = 0.03, SAME_CARRIER = 1 / 3;
/** A mobile carrier that keeps its subscribers from each other: every other one [G]. */
const ISOLATED = 0.5;
/** EIM+APDF routers whose INPUT chain accepts: hotspots, Docker and VM hosts; share [G]. */
const INPUT_ACCEPT = 0.15;
/** A NAT that forgets in mid-session [mix]. */
const FORGETS = 0.03;
/** Connection tracking of a router, and ports of a subscriber [mix]. */
const MAX_MAPPINGS = 4_096, QUOTAS = [512, 1_024, 2_048, 4_096] as const;
/** Conversations that go on, to see what becomes of paths [G]. */
const LONG = 0.05;

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

export const isHard = (kind: Kind) => kind.mapping !== "EIM";
export const isSequence = (kind: Kind) => kind.allocation === "sequential";
export const isAdmitting = (kind: Kind) => kind.filtering !== "APDF";

/** Of two NATs: all but two symmetric ones of which one gives random ports, where the odds are quadratic. */
export const canPunch = (one: Kind, other: Kind) =>
  !(isHard(one) && isHard(other)) || (isSequence(one) && isSequence(other));

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
  r: [number, number]; // round trips in ms: from each to the server, and from one to the other
  d: number;
  forgets: boolean;
  isLong: boolean;
}

export type Chance = () => number;
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

/** What a system made of a pair; times in ms since the call, Infinity for never. */
export interface Outcome {
  messageMs: number; // until the first message has arrived
  directMs: number; // both sides have a direct path
  datagrams: number; // that the two have sent until then, or until JUDGED_MS
}
