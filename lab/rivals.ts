/**
 * Four well-known systems as small models of their published constants, over the same pairs as the real machines of
 * population.ts.
 *
 * @module
 */
import { canPunch, type Chance, isAdmitting, isHard, isSequence, JITTER_MS, type Kind, LOSS } from "./mix.ts";
import { MIX, type Outcome, type Pair } from "./mix.ts";

/** Direct by then, or counted as relayed. */
export const JUDGED_MS = 15_000;

/** Somebody else's system, by its constants. */
export interface Model {
  name: string;
  /** Of one attempt between two UDP-capable classes, without loss and INPUT accept: as the published sums were made. */
  odds(one: Kind, other: Kind): number;
  simulate(pair: Pair, next: Chance): Outcome;
  hasRelay: boolean; // does a message arrive without a direct path: a relay, over TCP where UDP is blocked
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
