/**
 * A server and clients in the simulated internet: what the tests of the machines begin with.
 *
 * @module
 */
import { type Client, type ClientEvent, type ClientOptions, type Command, createClient } from "../client.ts";
import {
  type Datagram,
  decode,
  diffieHellman,
  type Effect,
  encode,
  formatEndpoint,
  hex,
  type KeyPair,
  keysFrom,
  loginKey,
} from "../protocol.ts";
import { VERSION } from "../protocol.ts";
import { createServer, type Server, type ServerEvent, type ServerOptions } from "../server.ts";
import {
  createNetwork,
  type Host,
  type Nat,
  NATS,
  type Network,
  type NetworkOptions,
  type Process,
  random,
} from "./network.ts";

/** Kinds of site, see `site`: the NATs of the 91 pairs. */
export const KINDS = [
  "public",
  "EIM+EIF random",
  "EIM+ADF random",
  "EIM+APDF random",
  "EIM+APDF preserving",
  "EIM+APDF sequential",
  "linux drop",
  "linux accept",
  "carrier",
  "APDM+APDF preserving",
  "APDM+APDF sequential",
  "APDM+APDF random",
  "linux random",
] as const;

/** One way from each client, and from the server, to the core: R = D = 80 ms unless told otherwise. */
export const DELAY_MS = 20;
export const R = 4 * DELAY_MS, D = 4 * DELAY_MS;

/** Is told every effect of every machine, in order; `now` is the machine's. */
export type Watch = (machine: string, now: number, effect: Effect<ClientEvent | ServerEvent>) => void;

/** A stream of random bytes, and of keys made of them. */
interface Stream {
  bytes: (length: number) => Uint8Array;
  keys: () => KeyPair;
}

export interface World {
  net: Network;
  /** For the tests themselves: each machine has a stream of its own, so that no machine shifts another one's. */
  bytes: (length: number) => Uint8Array;
  keys: () => KeyPair;
  /** The stream of the next machine of this name. */
  stream(name: string): Stream;
  /** A number for the next site: addresses are made of it. */
  nextSite(): number;
  watch: Watch | undefined;
  serverHost: Host;
  server: Process<ServerEvent>;
  machine: Server;
  /** Kills the server and starts another one in its place, which knows nothing. */
  restartServer(): void;
}

/** Where a client stands and what is special about it. */
export interface PlayerOptions extends Partial<ClientOptions> {
  /** A row of NATS, a NAT, or null for a public address. */
  nat?: string | Nat | null;
  address?: string;
  v6?: string;
  delayMs?: number;
  port?: number;
  host?: Host;
}

export interface Player {
  name: string;
  client: Client;
  host: Host;
  nat: Nat | null;
  process: Process<ClientEvent>;
  events<E extends ClientEvent["event"]>(event: E): (Extract<ClientEvent, { event: E }> & { at: number })[];
  command(command: Command): void;
  send(to: string, text: string): void;
  path(): string;
  /** Its computer sleeps, or somebody sets the clock: from now on `now` is so much later. */
  jump(ms: number): void;
}

/** A network with a server in it. */
export function createWorld(
  options: NetworkOptions & { server?: Partial<ServerOptions>; v6?: boolean; watch?: Watch } = {},
): World {
  const { server: serverOptions, v6, watch, ...conditions } = options;
  const seed = options.seed ?? 1;
  const net = createNetwork({ seed, ...conditions });
  const runs = new Map<string, number>();
  let sites = 0;
  const stream = (name: string) => {
    const run = (runs.get(name) ?? 0) + 1;
    runs.set(name, run);
    return createStream(`${seed} ${name} ${run}`);
  };
  const [home = "192.0.2.1", other] = serverOptions?.hosts ?? [];
  const addresses = [home, ...other ? [other] : [], ...v6 ? ["2001:db8:5::1"] : []];
  const serverHost = net.host({ name: "server", addresses, delayMs: DELAY_MS });
  const start = () => startServer(world, serverHost, serverOptions);
  const world = {
    net,
    ...createStream(`world ${seed}`),
    stream,
    nextSite: () => sites++,
    watch,
    serverHost,
    restartServer() {
      world.server.stop();
      Object.assign(world, start());
    },
  } as World;
  return Object.assign(world, start());
}

/** A server on a host, which other tests may have several of. */
export function startServer(
  world: Pick<World, "stream" | "watch" | "net">,
  host: Host,
  options: Partial<ServerOptions> = {},
): { machine: Server; server: Process<ServerEvent> } {
  const { bytes, keys } = world.stream(host.name);
  const made = createServer({ keys: keys(), random: bytes, ...options });
  const machine = watched(made, { name: host.name, watch: world.watch, clock: world.net.now });
  const [home, other] = options.hosts ?? [];
  const at = (address: string, ...ports: number[]) => ports.map((port) => ({ port, address }));
  const ports = home && other ? [...at(home, 2280, 2281, 2282), ...at(other, 2280, 2281)] : [2280, 2281, 2282];
  return { machine, server: host.run<ServerEvent>(machine, { ports }) };
}

function createStream(seed: string): Stream {
  const next = random(seed);
  const bytes = (length: number) => Uint8Array.from({ length }, () => Math.floor(next() * 256));
  return { bytes, keys: () => keysFrom(bytes(32)) };
}

/** The same machine, but `watch` is told its effects, and a wake that leaves it due at once is an error. */
function watched<M extends Client | Server>(
  machine: M,
  { name, watch, clock }: { name: string; watch: Watch | undefined; clock: () => number },
): M {
  const methods = Object.entries(machine).map(([method, work]) => [method, (...args: unknown[]) => {
    const answer = work(...args);
    if (method === "wakeAt") return answer;
    const now = method === "stop" ? clock() : args.at(-1) as number; // the others have the time as the last argument
    for (const effect of answer) watch?.(name, now, effect);
    // The deadline of a machine is the earliest of all its rooms', so this holds for each of them.
    if (method === "wake" && machine.wakeAt() <= now) {
      throw new Error(`"${name}" is due again at once after a wake: wakeAt() ${machine.wakeAt()}, now ${now}`);
    }
    return answer;
  }]);
  return Object.fromEntries(methods);
}

/** Where a client of this kind stands; the carrier's is a home behind a carrier's NAT. */
export function site(world: World, kind: string): { nat: Nat | null } {
  if (kind === "public") return { nat: null };
  const number = world.nextSite();
  const address = `203.0.${Math.floor(number / 250)}.${number % 250 + 1}`;
  const place = { name: `nat ${number}`, delayMs: DELAY_MS, address };
  if (kind !== "carrier") return { nat: world.net.nat({ ...NATS[kind]!, ...place }) };
  const carrier = world.net.nat({ ...NATS["cgn"]!, ...place });
  const home = { ...NATS["linux drop"]!, name: `home ${number}`, address: "100.64.0.9", behind: carrier };
  return { nat: world.net.nat(home) };
}

/** A client, behind a NAT of its own if asked for; it begins to log in at once. */
export function join(world: World, name: string, options: PlayerOptions = {}): Player {
  const { nat: kind = null, v6, delayMs = DELAY_MS, port = 0, address, host: given, ...rest } = options;
  const site = world.nextSite() % 60_000, low = site % 250 + 1, high = Math.floor(site / 250);
  const nat = typeof kind === "string"
    ? world.net.nat({ name: `nat of ${name}`, address: `203.${high % 200}.113.${low}`, delayMs, ...NATS[kind]! })
    : kind;
  const inside = address ?? given?.addresses[0] ?? (nat ? `192.168.${low}.10` : `198.51.${high % 200}.${low}`);
  const host = given ??
    world.net.host({
      name,
      addresses: [inside, ...v6 ? [v6] : []],
      behind: nat ?? undefined,
      delayMs: nat ? 0 : delayMs,
    });
  const servers = [formatEndpoint("192.0.2.1", 2280), ...v6 ? [formatEndpoint("2001:db8:5::1", 2280)] : []];
  const { bytes, keys } = world.stream(name);
  const made = createClient({ name, keys: keys(), servers, random: bytes, generateKeys: keys, ...rest });
  const client = watched(made, { name, watch: world.watch, clock: world.net.now });
  client.interfaces([inside], world.net.now());
  let ahead = 0;
  const process = host.run<ClientEvent>({
    opened: (socket, port, now) => client.opened(socket, port, now + ahead),
    receive: (datagram, now) => client.receive(datagram, now + ahead),
    wake: (now) => client.wake(now + ahead),
    wakeAt: () => client.wakeAt() - ahead,
  }, { ports: [port] });
  const player: Player = {
    name,
    client,
    host,
    nat,
    process,
    events: (event) =>
      process.events.filter((entry) => entry.event.event === event).map(({ at, event }) => ({ ...event, at })) as never,
    send: (to, text) => player.command({ command: "send", to, text }),
    command: (command) => process.call((now) => client.command(command, now + ahead)),
    jump(ms) {
      ahead += ms;
      process.call(() => []);
    },
    path: () => player.events("path").at(-1)?.path ?? "relay",
  };
  return player;
}

/** Runs until all of them are in. */
export function login(world: World, ...players: Player[]): void {
  const all = world.net.runUntil(() => players.every((player) => player.events("login").length > 0), 30_000);
  if (!all) throw new Error("Somebody is not in after 30 s");
}

/**
 * Logs in many users of whom nothing more is wanted, one each millisecond, without a machine each: their datagrams go
 * straight to the server.
 */
export function crowd(world: World, names: string[], { keepName = false } = {}): void {
  const own = world.keys();
  let shared: Uint8Array | null = null;
  for (const [i, name] of names.entries()) {
    const from = `198.18.${i >> 8}.${i & 255}:4000`, nonce = hex(world.bytes(8)), now = world.net.now();
    const ask = (cookie: string, key?: Uint8Array) => {
      const terms = { version: VERSION, flag: keepName };
      const login = {
        type: "LOGIN",
        cookie,
        key: own.public,
        proof: "0".repeat(16),
        terms,
        direct: 1,
        rttMs: 0,
      } as const;
      const data = encode({ ...login, name, local: [] }, { id: nonce, counter: Math.floor(now), key });
      const [effect] = world.machine.receive({ socket: 0, from, data }, now).filter(({ kind }) => kind === "send");
      return effect?.kind === "send" ? decode(effect.data) : null;
    };
    const cookie = ask("0".repeat(16));
    if (cookie?.type !== "COOKIE") throw new Error("No cookie");
    shared ??= diffieHellman(own.secret, cookie.key)!;
    if (ask(cookie.cookie, loginKey(shared, nonce))?.type !== "WELCOME") throw new Error("Not welcome");
    world.net.run(1);
  }
}

/** What a process did not send, straight into a machine's hands. */
export function deliver(player: Player, datagram: Datagram): void {
  player.process.call((now) => player.client.receive(datagram, now));
}
