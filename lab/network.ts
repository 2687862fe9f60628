/**
 * A simulated internet under virtual time. The real machines of server.ts and client.ts run on its hosts; a day
 * passes in a second, and a seed that fails fails again. No socket, no timer, no wall clock.
 *
 *              core              taps, loss, jitter, copies; its `hops` routers eat the TTL
 *            /   |   \           every line is a link with a one-way delayMs
 *         nat   host  carrier    a packet climbs until some node knows the way down to its destination
 *        /   \          |        through `up` of each parent, then through `down` of each child;
 *     host   host      nat       it is translated wherever it passes a NAT
 *                       |
 *                      host
 *
 * Delays. Through the core: the sum of the links of both sides. Turning round below a NAT (LAN, or two subscribers
 * of one carrier): the links used plus that NAT's lanDelayMs; by hairpin twice lanDelayMs. Links default to 0, so
 * `delayMs: 20` on the NAT, or on a host that has none, puts it exactly 20 ms from the core.
 *
 * Left out on purpose: ICMP (a NAT that rejects looks like one that drops), fragments, routers' queues.
 *
 * @module
 */
import type { Effect, Endpoint, Machine } from "../protocol.ts";
import { formatEndpoint, parseEndpoint } from "../protocol.ts";

const START_MS = 1_700_000_000_000; // not 0: a machine that takes 0 for "never" must not get away with it
const LOOPBACK_DELAY_MS = 1 / 16; // as LAN_DELAY_MS a binary fraction, so that sums with START_MS are exact
const LAN_DELAY_MS = 0.5;
const REORDER_MS = 30; // how long a reordered datagram is held back
const CORE_HOPS = 12; // a TTL of 5 or 8 dies after the sender's NATs and before the receiver's, 64 passes
const DEFAULT_TTL = 64;
const MAX_DATAGRAM_BYTES = 65_507; // what fits into an IPv4 packet behind its own header and UDP's
const EPHEMERAL_PORTS = [32_768, 60_999] as const; // Linux: ip_local_port_range
const MAX_SOCKETS = 16_384; // of one host: its ephemeral ports never run out
const NAT_PORTS = [1_024, 65_535] as const;
const LIFETIME_MS = 120_000; // RFC 4787 REQ-5: not less than two minutes
const SPIN_LIMIT = 10;

// ---------------------------------------------------------------------------------------------------- types

/** What became of a datagram at one node. All but `sent`, `passed`, `duplicated` and `delivered` are its end. */
export type Fate =
  | "sent" // left a socket
  | "passed" // was forwarded by a NAT or by the core
  | "delivered" // reached a machine
  | "duplicated" // the core made a copy, which goes on under the same id
  | "lost" // by `conditions.loss`
  | "blocked" // by a predicate given to `block`
  | "tapped" // by a tap that said "drop"
  | "filtered" // the NAT has the mapping, but does not admit this remote endpoint (RFC 4787 section 5)
  | "unmapped" // the NAT has no such mapping
  | "no-port" // the NAT has no port left for a new mapping, or may not make one
  | "no-hairpin" // sent to its own NAT's public address, and that NAT does not hairpin
  | "no-route" // nobody owns the destination, or the sender has no address of its family
  | "no-socket" // the host has no socket on that port, or the machine sent on one that is not open
  | "ttl"
  | "too-long";

/** A datagram as seen at one node. Changing the bytes of `data` in a tap tampers with the datagram itself. */
export interface TraceRecord {
  at: number;
  id: number;
  node: string; // where: the name of a host or a NAT, or "core"
  fate: Fate;
  host: string; // that sent it; "" if it was injected
  from: Endpoint; // in the outer header, after this node has translated it
  to: Endpoint;
  inner?: Endpoint | undefined; // where a NAT passed it: the inside endpoint, of the source up, of the destination down
  bytes: number;
  ttl: number;
  data: Uint8Array;
}

/** What the core does to every datagram that crosses it. All 0 but reorderMs, 30. */
export interface Conditions {
  loss: number; // probability, 0 to 1
  duplicate: number; // probability
  reorder: number; // probability of being held back by reorderMs, and so overtaken
  reorderMs: number;
  jitterMs: number; // extra delay, uniform from 0 to this; it reorders as well
}

/** What to create: the first conditions, and these. */
export interface NetworkOptions extends Partial<Conditions> {
  seed?: number | string;
  hops?: number; // routers on the core: what it takes off a TTL; default 12
  reuseBuffers?: boolean; // spoil the bytes of a datagram once the machine has dealt with it, as some runtimes do
}

/** Endpoint-independent, address-dependent, address- and port-dependent (RFC 4787 section 4.1). */
export type Mapping = "EIM" | "ADM" | "APDM";
/** The same for filtering (RFC 4787 section 5). */
export type Filtering = "EIF" | "ADF" | "APDF";

/** How a NAT behaves, in the words of RFC 4787. Where it stands is `NatPlace`. */
export interface NatOptions {
  mapping: Mapping;
  filtering: Filtering; // asked of each mapping for itself
  // An outside port belongs to one mapping: an APDM NAT preserves it for an inside endpoint's first destination only.
  // { block }: random, within a block of that many ports that each inside address gets for itself.
  allocation: "preserving" | "sequential" | "random" | { block: number };
  subscriberBlock?: number; // such a block for any other allocation
  portRange?: readonly [number, number]; // default 1024 to 65535
  step?: number; // of a sequential allocation; default 1
  foreignRate?: number; // other people's flows per second (Poisson), each takes a sequential port; default 0
  pooling?: "paired" | "arbitrary"; // of several public addresses: one for each inside address (default), or any
  hairpin?: boolean | "external" | "internal"; // true: external, as REQ-9 demands; internal keeps the inside source
  lifetimeMs?: number; // a mapping, and each permission in it, dies when idle for so long; default 120 s
  unrepliedMs?: number; // the same as long as nothing has come back; default lifetimeMs
  absoluteLifetimeMs?: number; // a mapping dies at this age, whatever the traffic
  inboundRefresh?: boolean; // outbound packets refresh (REQ-6: MUST), admitted inbound ones too (MAY); default true
  maxMappings?: number; // beyond it new ones fail
  quota?: number; // the same for each inside address
  firewall?: boolean; // it stands before public addresses: filters, and translates nothing
  v6Filter?: Filtering | "none"; // IPv6 is never translated; default APDF
  linux?: "accept" | "drop"; // masquerading, and what the INPUT chain does to packets for nobody; see `linux`
}

/** Where a NAT stands. */
export interface NatPlace {
  name: string;
  address?: string | string[]; // public; none for a firewall
  behind?: Nat | undefined; // default: nothing, it is in the core
  delayMs?: number; // one way to the core, or to what it is behind; default 0
  lanDelayMs?: number; // one way between two nodes behind it; default 0.5
}

/** Where a host stands. */
export interface HostPlace {
  name: string;
  addresses: string[]; // IPv4 and IPv6; it sends from the first one of the destination's family
  behind?: Nat | undefined;
  delayMs?: number;
  maxSockets?: number; // further binds fail (port 0); default 16,384
}

interface Address {
  readonly host: string;
  readonly port: number;
}

interface Packet {
  readonly id: number;
  readonly host: string;
  readonly data: Uint8Array;
  src: Address;
  dst: Address;
  ttl: number;
}

/** Something at the lower end of a link. */
interface Node {
  readonly name: string;
  readonly addresses: string[];
  delayMs: number;
  parent: Parent | null;
  down(packet: Packet): void; // a packet has come down the link
}

/** Something with links below it. */
interface Parent extends Node {
  readonly routes: Map<string, Node>; // which child leads to an address
  transparent(address: string): boolean; // is this address, owned by a node below, the same one above?
  up(packet: Packet): void; // a packet has come up from a child
}

/** A NAT or a firewall. */
export interface Nat extends Parent {
  readonly options: NatOptions;
  /** The live mappings; `inner` is null for what a Linux router believes to have accepted itself. */
  mappings(): { inner: Endpoint | null; outer: Endpoint; remotes: Endpoint[]; ageMs: number; idleMs: number }[];
  /** Forgets all mappings and blocks (a reboot); a sequential counter goes on from where it was. */
  flush(): void;
  /** The provider hands out another address; no mapping survives it. */
  readdress(address: string | string[]): void;
}

/** A computer. */
export interface Host extends Node {
  /** Another network, same processes: roaming. No addresses: the cable is out. */
  move(to: { addresses: string[]; behind?: Nat | undefined; delayMs?: number }): void;
  /** Kills all processes and leaves the network; `on` comes back without them. */
  off(): void;
  on(): void;
  /** Starts a machine: binds sockets 0, 1, ... and calls `opened` for each. */
  run<Event>(machine: Machine<Event>, options?: RunOptions<Event>): Process<Event>;
}

/** How to start a machine. */
export interface RunOptions<Event> {
  ports?: (number | { port: number; address?: string })[]; // default one ephemeral, which is 0; no address: any
  onEvent?: (event: Event, at: number) => void;
}

/** A machine that runs on a host. */
export interface Process<Event> {
  readonly events: { at: number; event: Event }[]; // all that the machine told its user
  readonly ports: number[]; // by socket number; 0 where the bind failed
  readonly running: boolean;
  readonly sent: number; // datagrams
  readonly received: number;
  perform(effects: Effect<Event>[]): void;
  /** A user's command: `client.call((now) => machine.command(line, now))`. */
  call(command: (now: number) => Effect<Event>[]): void;
  /** Killed: its sockets are gone, nobody is told. */
  stop(): void;
}

/** What `createNetwork` returns. */
export interface Network {
  now(): number;
  after(ms: number, action: () => void): void;
  run(ms: number): void;
  /** Runs until the predicate, asked after every event, is true: true; or until the limit: false. */
  runUntil(predicate: () => boolean, limitMs: number): boolean;
  nat(options: NatOptions & NatPlace): Nat;
  host(place: HostPlace): Host;
  get conditions(): Conditions;
  /** Replaces them all: what is not given is as in `Conditions`. */
  set conditions(conditions: Partial<Conditions>);
  /** Drops what the predicate picks, on the core and where packets turn round below a NAT. Returns the undo. */
  block(predicate: (packet: TraceRecord) => boolean): () => void;
  /** An on-path observer of the core. It also sees injected datagrams: their `host` is "". Returns the undo. */
  tap(observer: (packet: TraceRecord) => "drop" | void): () => void;
  /** An attacker puts a datagram with any source into the core. */
  inject(datagram: { from: Endpoint; to: Endpoint; data: Uint8Array; ttl?: number }): void;
  /** Is told every hop of every datagram. */
  trace?: (record: TraceRecord) => void;
}

// --------------------------------------------------------------------------------------------- small functions

/** A stream of numbers in [0, 1) that depends on nothing but the seed (sfc32). */
export function random(seed: number | string): () => number {
  let hash = 2_166_136_261; // FNV-1a
  for (const char of `${seed}`) hash = Math.imul(hash ^ char.charCodeAt(0), 16_777_619);
  let a = hash, b = hash ^ 0x9e3779b9, c = hash ^ 0x243f6a88, d = 1;
  const next = () => {
    const t = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + t) | 0;
    return (t >>> 0) / 4_294_967_296;
  };
  for (let round = 0; round < 15; round++) next();
  return next;
}

/**
 * A number from the exponential distribution of mean 1, by von Neumann's comparisons. It needs no logarithm, whose last
 * bit differs between the JavaScript engines: so a world is the same on each of them.
 */
function exponential(next: () => number): number {
  for (let whole = 0;; whole++) {
    // How long the numbers fall is odd with the probability e^-first: then `first` is the fraction; else one more whole.
    const first = next();
    let length = 1;
    for (let last = first, one; (one = next()) < last; last = one) length++;
    if (length % 2 === 1) return whole + first;
  }
}

const integer = (next: () => number, low: number, high: number) => low + Math.floor(next() * (high - low + 1));
const isV6 = (host: string) => host.includes(":");
const isLoopback = (host: string) => host === "::1" || host.startsWith("127.");
const text = (address: Address): Endpoint => formatEndpoint(address.host, address.port);
const list = (address: string | string[] = []) => typeof address === "string" ? [address] : address;

/**
 * The virtual clock: a binary heap of what is to happen, ties in the order in which they were scheduled. Machines wake
 * after all else that happens at the same instant, in the order in which they were started (their `rank`): so a machine
 * that wakes in vain, and is scheduled again for the same instant as before, changes nothing for the others.
 */
function createClock() {
  interface Due {
    readonly at: number;
    readonly rank: number;
    readonly order: number;
    readonly action: () => void;
  }
  const heap: Due[] = [];
  let now = START_MS, order = 0;
  const before = (a: Due, b: Due) => (a.at - b.at || a.rank - b.rank || a.order - b.order) < 0;

  function schedule(at: number, action: () => void, rank = 0) {
    if (Number.isNaN(at)) throw new Error("Cannot schedule an event at NaN");
    const due = { at: Math.max(at, now), rank, order: order++, action };
    let i = heap.length;
    for (let above; i > 0 && before(due, above = heap[(i - 1) >> 1]!); i = (i - 1) >> 1) heap[i] = above;
    heap[i] = due;
  }

  /** Carries out the next event that is due by then; false if there is none. */
  function step(until: number): boolean {
    const first = heap[0];
    if (!first || first.at > until) return false;
    const last = heap.pop()!;
    for (let i = 0; heap.length > 0;) {
      let child = 2 * i + 1;
      if (child + 1 < heap.length && before(heap[child + 1]!, heap[child]!)) child++;
      const goesUp = child < heap.length && before(heap[child]!, last);
      heap[i] = goesUp ? heap[child]! : last;
      if (!goesUp) break;
      i = child;
    }
    now = first.at;
    first.action();
    return true;
  }

  return { now: () => now, advance: (to: number) => now = Math.max(now, to), schedule, step };
}

// -------------------------------------------------------------------------------------------- the NAT's table

interface Timer {
  last: number;
  replied: boolean;
}

interface Entry extends Timer {
  readonly key: string;
  readonly outerKey: string;
  readonly inner: Address | null;
  readonly outer: Address;
  readonly born: number;
  readonly contacts: Map<string, Timer>; // permissions: by remote address for ADF, by remote endpoint for APDF
}

interface Pool {
  readonly low: number;
  readonly high: number;
  next: number;
  foreignAt: number;
}

/** What a NAT remembers. `outbound` and `inbound` translate one endpoint, or say why not. */
function createTable(
  options: NatOptions,
  { addresses, now, next }: { addresses: string[]; now: () => number; next: () => number },
) {
  const { mapping, filtering, allocation, linux, firewall = false, v6Filter = "APDF", step = 1 } = options;
  const { lifetimeMs = LIFETIME_MS, unrepliedMs = lifetimeMs, absoluteLifetimeMs = Infinity } = options;
  const { inboundRefresh = true, maxMappings = Infinity, quota = Infinity, foreignRate = 0 } = options;
  const kind = typeof allocation === "object" ? "random" : allocation;
  const block = typeof allocation === "object" ? allocation.block : options.subscriberBlock;
  const [lowest, highest] = options.portRange ?? NAT_PORTS;

  const byInner = new Map<string, Entry>();
  const byOuter = new Map<string, Entry>();
  const blocks = new Map<string, Pool | null>();
  const paired = new Map<string, string>();
  const everything = createPool(lowest, highest);
  let sweepAt = 1_024;

  const transparent = (host: string) => firewall || isV6(host);
  const filterOf = (host: string) => isV6(host) ? v6Filter : filtering;
  const isFresh = (timer?: Timer) =>
    timer !== undefined && now() - timer.last < (timer.replied ? lifetimeMs : unrepliedMs);

  function innerKey(inner: Address, remote: Address) {
    // A Linux router has one entry for each flow, and is endpoint-independent only because it preserves the port.
    if (transparent(inner.host) || (mapping === "EIM" && !linux)) return text(inner);
    return `${text(inner)} ${mapping === "ADM" && !linux ? remote.host : text(remote)}`;
  }

  /** Linux needs a unique 5-tuple only: several flows share one outside port. The others give it to one mapping. */
  function outerKey(outer: Address, remote: Address) {
    return linux && !transparent(outer.host) ? `${text(outer)} ${text(remote)}` : text(outer);
  }

  function live(entry: Entry | undefined) {
    if (!entry || (isFresh(entry) && now() - entry.born < absoluteLifetimeMs)) return entry;
    byInner.delete(entry.key);
    byOuter.delete(entry.outerKey);
  }

  function sweep() {
    for (const entry of byInner.values()) live(entry);
    sweepAt = 2 * byInner.size + 1_024;
  }

  function createPool(low: number, high: number): Pool {
    return { low, high, next: integer(next, low, high), foreignAt: now() };
  }

  /** The ports an inside address may have: all of them, or its block; null once there are no blocks left. */
  function poolOf(host: string): Pool | null {
    if (!block) return everything;
    let pool = blocks.get(host);
    if (pool === undefined) {
      const taken = new Set([...blocks.values()].map((pool) => pool?.low));
      const free = [];
      for (let low = lowest; low + block - 1 <= highest; low += block) if (!taken.has(low)) free.push(low);
      const low = free[integer(next, 0, free.length - 1)];
      pool = low === undefined ? null : createPool(low, low + block - 1);
      blocks.set(host, pool);
    }
    return pool;
  }

  function addressFor(host: string) {
    const any = addresses[integer(next, 0, addresses.length - 1)]!;
    if (options.pooling === "arbitrary") return any;
    return paired.get(host) ?? (paired.set(host, any), any);
  }

  function allocate(inner: Address, remote: Address): Address | null {
    const host = addressFor(inner.host);
    const pool = poolOf(inner.host);
    if (!pool) return null;
    const size = pool.high - pool.low + 1;
    const wrap = (port: number) => pool.low + (((port - pool.low) % size) + size) % size;
    const isFree = (port: number) => !live(byOuter.get(outerKey({ host, port }, remote)));

    if (kind === "preserving" && inner.port >= pool.low && inner.port <= pool.high && isFree(inner.port)) {
      return { host, port: inner.port };
    }
    if (kind === "sequential") {
      for (; foreignRate > 0 && pool.foreignAt <= now(); pool.foreignAt += exponential(next) * 1000 / foreignRate) {
        pool.next = wrap(pool.next + step);
      }
    }
    // Random ones, and preserving ones whose port is taken, start anywhere; a taken port is passed over.
    let port = kind === "sequential" ? pool.next : integer(next, pool.low, pool.high);
    for (let tries = 0; tries < size; tries++, port = wrap(port + step)) {
      if (!isFree(port)) continue;
      if (kind === "sequential") pool.next = wrap(port + step);
      return { host, port };
    }
    return null;
  }

  function hasRoom(host: string) {
    if (byInner.size >= Math.min(sweepAt, maxMappings) || quota < Infinity) sweep();
    if (byInner.size >= maxMappings) return false;
    if (quota === Infinity) return true;
    let count = 0;
    for (const entry of byInner.values()) if (entry.inner?.host === host) count++;
    return count < quota;
  }

  function enter(key: string, inner: Address | null, outer: Address, remote: Address): Entry {
    const names = { key, outerKey: outerKey(outer, remote), inner, outer };
    const entry = { ...names, born: now(), last: now(), replied: false, contacts: new Map() };
    byInner.set(key, entry);
    byOuter.set(entry.outerKey, entry);
    return entry;
  }

  function outbound(inner: Address, remote: Address): Address | Fate {
    if (filterOf(inner.host) === "none") return inner;
    const key = innerKey(inner, remote);
    let entry = live(byInner.get(key));
    if (!entry) {
      const outer = !hasRoom(inner.host) ? null : transparent(inner.host) ? inner : allocate(inner, remote);
      if (!outer) return "no-port";
      entry = enter(key, inner, outer, remote);
    }
    entry.last = now();
    for (const whom of [remote.host, text(remote)]) {
      const contact = entry.contacts.get(whom);
      if (contact && isFresh(contact)) contact.last = now();
      else entry.contacts.set(whom, { last: now(), replied: false });
    }
    return entry.outer;
  }

  function inbound(remote: Address, outer: Address): Address | Fate {
    const filter = filterOf(outer.host);
    if (filter === "none") return outer;
    const entry = live(byOuter.get(outerKey(outer, remote)));
    if (!entry?.inner) {
      // Linux with INPUT accept believes that a packet for nobody is for itself, and tracks it. That flow then owns
      // the 5-tuple: when an inside host answers from the very port that was meant, it gets another one outside.
      // Every further packet keeps it so. Dropped or rejected in INPUT, the flow is never confirmed: no trace.
      if (entry) entry.last = now();
      else if (linux === "accept" && !transparent(outer.host) && hasRoom("")) {
        enter(`input ${outerKey(outer, remote)}`, null, outer, remote);
      }
      return "unmapped";
    }
    const whom = [entry.contacts.get(remote.host), entry.contacts.get(text(remote))];
    if (filter !== "EIF" && !isFresh(whom[filter === "ADF" ? 0 : 1])) return "filtered";
    for (const timer of [entry, ...whom]) {
      if (!timer) continue;
      timer.replied = true;
      if (inboundRefresh) timer.last = now();
    }
    return entry.inner;
  }

  function flush() {
    for (const memory of [byInner, byOuter, blocks, paired]) memory.clear();
  }

  function mappings() {
    sweep();
    return [...byInner.values()].map((entry) => ({
      inner: entry.inner && text(entry.inner),
      outer: text(entry.outer),
      remotes: [...entry.contacts].filter(([whom, timer]) => isFresh(timer) && parseEndpoint(whom)).map(([whom]) =>
        whom
      ),
      ageMs: now() - entry.born,
      idleMs: now() - entry.last,
    }));
  }

  return { outbound, inbound, flush, mappings, transparent };
}

// ---------------------------------------------------------------------------------------------- the network

/** An empty internet: a core and a clock. Each NAT and each host has its own stream of random numbers, by its name. */
export function createNetwork(options: NetworkOptions = {}): Network {
  const { seed = 1, hops = CORE_HOPS, reuseBuffers = false, ...initial } = options;
  const clock = createClock();
  const { now, schedule } = clock;
  const chance = random(`${seed} core`);
  const blocks = new Set<(packet: TraceRecord) => boolean>();
  const taps = new Set<(packet: TraceRecord) => "drop" | void>();
  let conditions = withDefaults(initial);
  let packets = 0, machines = 0;

  const after = (ms: number, action: () => void) => schedule(now() + ms, action);

  function withDefaults(given: Partial<Conditions>): Conditions {
    return { loss: 0, duplicate: 0, reorder: 0, reorderMs: REORDER_MS, jitterMs: 0, ...given };
  }

  function see(packet: Packet, node: string, fate: Fate, inner?: Address): TraceRecord {
    const { id, host, data, ttl } = packet;
    const [from, to] = [text(packet.src), text(packet.dst)];
    return { at: now(), id, node, fate, host, from, to, inner: inner && text(inner), bytes: data.length, ttl, data };
  }

  function record(packet: Packet, node: string, fate: Fate, inner?: Address) {
    net.trace?.(see(packet, node, fate, inner));
  }

  function isBlocked(packet: Packet, node: string) {
    for (const predicate of blocks) if (predicate(see(packet, node, "passed"))) return true;
    return false;
  }

  // A link without delay is crossed at once: half of the events saved. Nothing re-enters a machine by that, since
  // every packet spends at least one event where it turns round.
  function link(ms: number, action: () => void) {
    if (ms > 0) after(ms, action);
    else action();
  }
  const climb = ({ delayMs, parent }: Node, packet: Packet) => link(delayMs, () => parent?.up(packet));
  const descend = (node: Node, packet: Packet) => link(node.delayMs, () => node.down(packet));

  /** Makes a node's addresses known, or unknown, as far up as they mean something. */
  function announce(node: Node, isThere: boolean) {
    for (const address of node.addresses) {
      for (let child: Node = node; child.parent; child = child.parent) {
        const { routes, name, transparent } = child.parent;
        if (!isThere) routes.delete(address);
        else if (routes.has(address)) throw new Error(`Address "${address}" exists twice below "${name}"`);
        else routes.set(address, child);
        if (!transparent(address)) break;
      }
    }
  }

  const core: Parent = {
    ...{ name: "core", addresses: [], delayMs: 0, parent: null, routes: new Map() },
    transparent: () => false,
    down: () => {},
    up(packet) {
      let dropped = false;
      for (const observer of taps) if (observer(see(packet, "core", "passed")) === "drop") dropped = true;
      if (dropped) return record(packet, "core", "tapped");
      if (isBlocked(packet, "core")) return record(packet, "core", "blocked");
      const { loss, duplicate, reorder, reorderMs, jitterMs } = conditions;
      if (loss > 0 && chance() < loss) return record(packet, "core", "lost");
      packet.ttl -= hops;
      if (packet.ttl <= 0) return record(packet, "core", "ttl");
      const child = core.routes.get(packet.dst.host);
      if (!child) return record(packet, "core", "no-route");
      const copies = [packet];
      if (duplicate > 0 && chance() < duplicate) copies.push({ ...packet, data: packet.data.slice() });
      for (const copy of copies) {
        record(copy, "core", copy === packet ? "passed" : "duplicated");
        let extra = jitterMs > 0 ? chance() * jitterMs : 0;
        if (reorder > 0 && chance() < reorder) extra += reorderMs;
        after(child.delayMs + extra, () => child.down(copy));
      }
    },
  };

  function nat({ name, address, behind, delayMs = 0, lanDelayMs = LAN_DELAY_MS, ...options }: NatOptions & NatPlace) {
    const { hairpin = false, firewall = false } = options;
    const addresses = list(address);
    if (addresses.length === 0 && !firewall) throw new Error(`NAT "${name}" needs an address`);
    const table = createTable(options, { addresses, now, next: random(`${seed} nat ${name}`) });
    const { flush, mappings, transparent } = table;

    function up(packet: Packet) {
      const neighbour = self.routes.get(packet.dst.host);
      const own = addresses.includes(packet.dst.host);
      if (!neighbour && --packet.ttl <= 0) return record(packet, name, "ttl");
      if (own && !hairpin) return record(packet, name, "no-hairpin");
      if ((neighbour || own) && isBlocked(packet, name)) return record(packet, name, "blocked");
      if (neighbour) {
        record(packet, name, "passed");
        return after(lanDelayMs, () => descend(neighbour, packet));
      }
      const inner = packet.src;
      const outer = table.outbound(inner, packet.dst);
      if (typeof outer === "string") return record(packet, name, outer);
      packet.src = outer;
      record(packet, name, "passed", inner);
      if (own) after(2 * lanDelayMs, () => admit(packet, hairpin === "internal" ? inner : outer));
      else climb(self, packet);
    }

    function admit(packet: Packet, src: Address) {
      const inner = table.inbound(packet.src, packet.dst);
      if (typeof inner === "string") return record(packet, name, inner);
      if (--packet.ttl <= 0) return record(packet, name, "ttl");
      const child = self.routes.get(inner.host);
      if (!child) return record(packet, name, "no-route");
      packet.src = src;
      packet.dst = inner;
      record(packet, name, "passed", inner);
      descend(child, packet);
    }

    function readdress(address: string | string[]) {
      announce(self, false);
      addresses.splice(0, Infinity, ...list(address));
      flush();
      announce(self, true);
    }

    const down = (packet: Packet) => admit(packet, packet.src);
    const parent = behind ?? core;
    const routes = new Map<string, Node>();
    const place = { name, addresses, delayMs, parent, routes };
    const self: Nat = { ...place, options, transparent, up, down, mappings, flush, readdress };
    announce(self, true);
    return self;
  }

  function host({ name, addresses, behind, delayMs = 0, maxSockets = MAX_SOCKETS }: HostPlace): Host {
    type Socket = { port: number; address: string | undefined; receive(packet: Packet): void };
    const next = random(`${seed} host ${name}`);
    const byPort = new Map<number, Socket[]>();
    const processes = new Set<{ stop(): void }>();
    let sockets = 0, isOn = true;

    function bind(port: number, address: string | undefined, receive: (packet: Packet) => void): Socket | null {
      if (sockets >= maxSockets) return null;
      if (port === 0) {
        do port = integer(next, ...EPHEMERAL_PORTS); while (byPort.has(port));
      }
      const others = byPort.get(port) ?? [];
      if (others.some((other) => !other.address || !address || other.address === address)) return null;
      const socket = { port, address, receive };
      byPort.set(port, [...others, socket]);
      sockets++;
      return socket;
    }

    function unbind(socket: Socket) {
      const others = byPort.get(socket.port)!.filter((other) => other !== socket);
      if (others.length > 0) byPort.set(socket.port, others);
      else byPort.delete(socket.port);
      sockets--;
    }

    function send(socket: Socket | undefined, to: Endpoint, data: Uint8Array, ttl: number) {
      const dst = parseEndpoint(to) ?? { host: to, port: 0 };
      const isLocal = isLoopback(dst.host) || self.addresses.includes(dst.host);
      const own = isLocal ? [dst.host.startsWith("127.") ? "127.0.0.1" : dst.host] : self.addresses;
      const source = socket?.address ?? own.find((address) => isV6(address) === isV6(dst.host));
      const src = { host: source ?? "0.0.0.0", port: socket?.port ?? 0 };
      const packet = { id: ++packets, host: name, data: data.slice(), src, dst, ttl };
      if (!socket) return record(packet, name, "no-socket");
      if (data.length > MAX_DATAGRAM_BYTES) return record(packet, name, "too-long");
      const isReachable = isLocal || self.addresses.includes(src.host);
      if (!isReachable || isV6(src.host) !== isV6(dst.host) || dst.port === 0) return record(packet, name, "no-route");
      record(packet, name, "sent");
      if (isLocal) after(LOOPBACK_DELAY_MS, () => deliver(packet));
      else climb(self, packet);
    }

    function deliver(packet: Packet) {
      const socket = byPort.get(packet.dst.port)?.find((one) => !one.address || one.address === packet.dst.host);
      if (!socket) return record(packet, name, "no-socket");
      record(packet, name, "delivered");
      socket.receive(packet);
    }

    function run<Event>(machine: Machine<Event>, { ports = [0], onEvent }: RunOptions<Event> = {}): Process<Event> {
      if (!isOn) throw new Error(`Host "${name}" is off`);
      const open = new Map<number, Socket>();
      const rank = ++machines;
      let armed = Infinity, ticket = 0, spins = 0, spunAt = 0;

      function openSocket(number: number, port: number, address?: string) {
        if (open.has(number)) throw new Error(`Socket ${number} of "${name}" is already open`);
        const socket = bind(port, address, (packet) => {
          process.received++;
          perform(machine.receive({ socket: number, from: text(packet.src), data: packet.data }, now()));
          if (reuseBuffers) packet.data.fill(0xdd);
        });
        if (socket) open.set(number, socket);
        process.ports[number] = socket?.port ?? 0;
        perform(machine.opened(number, process.ports[number], now()));
      }

      function perform(effects: Effect<Event>[]) {
        for (const effect of effects) {
          if (!process.running) return;
          if (effect.kind === "send") {
            process.sent++;
            send(open.get(effect.socket), effect.to, effect.data, effect.ttl ?? DEFAULT_TTL);
          } else if (effect.kind === "open") {
            after(0, () => process.running && openSocket(effect.socket, 0));
          } else if (effect.kind === "close") {
            const socket = open.get(effect.socket);
            if (socket) unbind(socket);
            open.delete(effect.socket);
          } else {
            process.events.push({ at: now(), event: effect.event });
            onEvent?.(effect.event, now());
          }
        }
        arm();
      }

      // One pending wake: a nearer deadline takes a new ticket; one that moved away is noticed when the old one is due.
      function arm() {
        if (!process.running) return;
        const at = Math.max(machine.wakeAt(), now());
        if (at >= armed || at === Infinity) return;
        armed = at;
        const mine = ++ticket;
        schedule(at, () => {
          if (!process.running || mine !== ticket) return;
          armed = Infinity;
          if (machine.wakeAt() > now()) return arm();
          const effects = machine.wake(now());
          spins = machine.wakeAt() > now() ? 0 : spunAt === now() ? spins + 1 : 1;
          spunAt = now();
          if (spins >= SPIN_LIMIT) throw new Error(`Machine spins: "${name}" is due again after each wake`);
          perform(effects);
        }, rank);
      }

      const process = {
        ...{ events: [] as { at: number; event: Event }[], ports: [] as number[], running: true, sent: 0, received: 0 },
        perform,
        call: (command: (now: number) => Effect<Event>[]) => process.running ? perform(command(now())) : undefined,
        stop() {
          process.running = false;
          for (const socket of open.values()) unbind(socket);
          open.clear();
          processes.delete(process);
        },
      };
      processes.add(process);
      ports.forEach((wanted, number) => {
        const { port, address } = typeof wanted === "number" ? { port: wanted, address: undefined } : wanted;
        openSocket(number, port, address);
      });
      arm();
      return process;
    }

    const self: Host = {
      ...{ name, addresses: [...addresses], delayMs, parent: behind ?? core, run },
      down: (packet) => self.addresses.includes(packet.dst.host) ? deliver(packet) : record(packet, name, "no-route"),
      move({ addresses, behind, delayMs = self.delayMs }) {
        if (isOn) announce(self, false);
        self.addresses.splice(0, Infinity, ...addresses);
        Object.assign(self, { parent: behind ?? core, delayMs });
        if (isOn) announce(self, true);
      },
      off() {
        for (const process of processes) process.stop();
        if (isOn) announce(self, false);
        isOn = false;
      },
      on() {
        if (!isOn) announce(self, true);
        isOn = true;
      },
    };
    announce(self, true);
    return self;
  }

  function remember<T>(set: Set<T>, item: T) {
    set.add(item);
    return () => void set.delete(item);
  }

  const net: Network = {
    now,
    after,
    run(ms) {
      const end = now() + ms;
      while (clock.step(end));
      clock.advance(end);
    },
    runUntil(predicate, limitMs) {
      const end = now() + limitMs;
      while (!predicate()) {
        if (clock.step(end)) continue;
        clock.advance(end);
        return predicate();
      }
      return true;
    },
    nat,
    host,
    get conditions(): Conditions {
      return conditions;
    },
    set conditions(given: Partial<Conditions>) {
      conditions = withDefaults(given);
    },
    block: (predicate) => remember(blocks, predicate),
    tap: (observer) => remember(taps, observer),
    inject({ from, to, data, ttl = DEFAULT_TTL }) {
      const [src, dst] = [parseEndpoint(from), parseEndpoint(to)];
      if (!src || !dst) throw new Error(`Cannot inject from "${from}" to "${to}": not two endpoints`);
      const packet = { id: ++packets, host: "", data: data.slice(), src, dst, ttl };
      after(0, () => core.up(packet));
    },
  };
  return net;
}

// ------------------------------------------------------------------------------------------------- presets

/**
 * A Linux router that masquerades: one conntrack entry for each flow, 30 s until something comes back and 120 s
 * from then on. It keeps the port if the 5-tuple is free, so it looks endpoint-independent, unless two inside hosts
 * use one port towards one server, or (INPUT accept) the peer's packet came first.
 */
export function linux(input: "accept" | "drop"): NatOptions {
  const ports = { mapping: "EIM", filtering: "APDF", allocation: "preserving" } as const;
  return { ...ports, linux: input, lifetimeMs: 120_000, unrepliedMs: 30_000 };
}

const KINDS = ["EIM+EIF", "EIM+ADF", "EIM+APDF", "ADM+ADF", "ADM+APDF", "APDM+APDF"];
const ALLOCATIONS = ["preserving", "sequential", "random"] as const;

/** Kinds of NAT by name: "EIM+APDF preserving" and so on, and those with a name of their own. */
export const NATS: Record<string, NatOptions> = {
  ...Object.fromEntries(KINDS.flatMap((kind) => {
    const [mapping, filtering] = kind.split("+") as [Mapping, Filtering];
    return ALLOCATIONS.map((allocation) => [`${kind} ${allocation}`, { mapping, filtering, allocation }]);
  })),
  firewall: { mapping: "EIM", filtering: "APDF", allocation: "preserving", firewall: true },
  "linux drop": linux("drop"),
  "linux accept": linux("accept"),
  /** `masquerade random,fully-random`. */
  "linux random": { ...linux("drop"), mapping: "APDM", allocation: "random" },
  /** Carrier NATs: a block of ports for each subscriber, the median idle time of the fixed line (IMC 2016). */
  cgn: { mapping: "EIM", filtering: "APDF", allocation: { block: 512 }, hairpin: true, lifetimeMs: 35_000 },
  "cgn symmetric": { mapping: "APDM", filtering: "APDF", allocation: { block: 1_024 }, lifetimeMs: 35_000 },
  /** A mobile carrier whose mappings die after a minute, whatever the keepalives. */
  cellular: { mapping: "APDM", filtering: "APDF", allocation: "random", absoluteLifetimeMs: 60_000 },
};
