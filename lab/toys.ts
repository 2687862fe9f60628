/**
 * Machines of ten lines, and a scene to put them in: the simulated internet is proved on them (network_test.ts,
 * nat_test.ts), before the real machines run in it.
 *
 * @module
 */
import type { Datagram, Effect, Endpoint, Machine } from "../protocol.ts";
import { type Conditions, createNetwork, type NatOptions, type Process } from "./network.ts";

export type Note = Omit<Datagram, "data"> & { text: string; at: number };

export const bytes = (text: string) => new TextEncoder().encode(text);

/** Notes what it hears; `answer` says what to reply. */
export function ear(answer: (note: Note) => string | null = () => null): Machine<Note> {
  return {
    opened: () => [],
    wake: () => [],
    wakeAt: () => Infinity,
    receive({ socket, from, data }, at) {
      const note = { socket, from, text: new TextDecoder().decode(data), at };
      const reply = answer(note);
      const effects: Effect<Note>[] = [{ kind: "event", event: note }];
      if (reply !== null) effects.push({ kind: "send", socket, to: from, data: bytes(reply) });
      return effects;
    },
  };
}
/** Replies with the endpoint it saw, as STUN does. */
export const mirror = () => ear((note) => note.from);
export const echo = () => ear((note) => note.text);

/** A machine that does nothing but wake. */
export function waker(wakeAt: () => number, wake: (now: number) => Effect[] = () => []): Machine {
  return { opened: () => [], receive: () => [], wakeAt, wake };
}

export function say(
  process: Process<Note>,
  to: Endpoint,
  options: { text?: string; socket?: number; ttl?: number } = {},
) {
  const { text = "x", socket = 0, ttl = 64 } = options;
  process.perform([{ kind: "send", socket, to, data: bytes(text), ttl }]);
}

export const heard = (process: Process<Note>) => process.events.map(({ event }) => event.text);
export const portOf = (endpoint: string) => Number(endpoint.slice(endpoint.lastIndexOf(":") + 1));

/** A client behind a NAT, and two servers that mirror, each on two ports. All 10 ms from the core. */
export function scene(options: NatOptions, conditions: Partial<Conditions> = {}) {
  const net = createNetwork({ seed: 7, ...conditions });
  const nat = net.nat({ ...options, name: "nat", address: options.firewall ? [] : "203.0.113.5", delayMs: 10 });
  const inside = options.firewall ? "203.0.113.10" : "192.168.1.10";
  const host = net.host({ name: "client", addresses: [inside], behind: nat });
  const client = host.run(ear(), { ports: [40_000] });
  const servers = ["198.51.100.1", "198.51.100.2"].map((address, i) =>
    net.host({ name: `server ${i}`, addresses: [address], delayMs: 10 }).run(mirror(), { ports: [2280, 2281, 2282] })
  );
  /** The client's public endpoint as that server sees it. */
  function seenBy(to: Endpoint, options: { process?: Process<Note>; socket?: number } = {}) {
    const { process = client, socket = 0 } = options;
    const before = process.events.length;
    say(process, to, { socket });
    net.run(100);
    return process.events[before]?.event.text ?? "nothing";
  }
  /** Does a packet from that server socket to an outside endpoint come in? */
  function comesIn(to: Endpoint, server = 0, socket = 0) {
    const before = client.events.length;
    say(servers[server]!, to, { socket, text: "hello" });
    net.run(100);
    return client.events.length > before;
  }
  return { net, nat, host, client, servers, seenBy, comesIn };
}

export const A = "198.51.100.1:2280", A2 = "198.51.100.1:2281", B = "198.51.100.2:2280";
