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
  encode,
  formatEndpoint,
  hex,
  type KeyPair,
  keysFrom,
  loginKey,
} from "../protocol.ts";
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

/** One way from each client, and from the server, to the core: R = D = 80 ms unless told otherwise. */
export const DELAY_MS = 20;
export const R = 4 * DELAY_MS, D = 4 * DELAY_MS;

export interface World {
  net: Network;
  bytes: (length: number) => Uint8Array;
  keys: () => KeyPair;
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
export function createWorld(options: NetworkOptions & { server?: Partial<ServerOptions>; v6?: boolean } = {}): World {
  const { server: serverOptions, v6, ...conditions } = options;
  const net = createNetwork({ seed: 1, ...conditions });
  const next = random(`world ${options.seed ?? 1}`);
  const bytes = (length: number) => Uint8Array.from({ length }, () => Math.floor(next() * 256));
  const keys = () => keysFrom(bytes(32));
  const addresses = ["192.0.2.1", ...v6 ? ["2001:db8:5::1"] : []];
  const serverHost = net.host({ name: "server", addresses, delayMs: DELAY_MS });
  const start = () => {
    const machine = createServer({ keys: keys(), random: bytes, ...serverOptions });
    return { machine, server: serverHost.run<ServerEvent>(machine, { ports: [2280, 2281, 2282] }) };
  };
  const world: World = {
    net,
    bytes,
    keys,
    serverHost,
    ...start(),
    restartServer() {
      world.server.stop();
      Object.assign(world, start());
    },
  };
  return world;
}

let sites = 0;

/** A client, behind a NAT of its own if asked for; it begins to log in at once. */
export function join(world: World, name: string, options: PlayerOptions = {}): Player {
  const { nat: kind = null, v6, delayMs = DELAY_MS, port = 0, address, host: given, ...rest } = options;
  const site = sites++ % 60_000, low = site % 250 + 1, high = Math.floor(site / 250);
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
  const client = createClient({
    name,
    keys: world.keys(),
    servers,
    random: world.bytes,
    generateKeys: world.keys,
    ...rest,
  });
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
export function crowd(world: World, names: string[]): void {
  const own = world.keys();
  let shared: Uint8Array | null = null;
  for (const [i, name] of names.entries()) {
    const from = `198.18.${i >> 8}.${i & 255}:4000`, nonce = hex(world.bytes(8)), now = world.net.now();
    const ask = (cookie: string, key?: Uint8Array) => {
      const login = { type: "LOGIN", cookie, key: own.public, proof: "0".repeat(16), keepName: 0, rttMs: 0 } as const;
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
