/**
 * The worlds of the oracle: about 300 small histories, named and seeded, which together have server.ts and client.ts
 * do all that they can do. What they find is not judged here: `oracle.ts` takes the hash of every effect.
 *
 * @module
 */
import { decode, type Endpoint, keyFromWords, type Machine } from "../protocol.ts";
import { type Nat, NATS, type NetworkOptions, random } from "./network.ts";
import type { Player, PlayerOptions, Watch, World } from "./scenario.ts";
import { createWorld, DELAY_MS, join, KINDS, login, site, startServer } from "./scenario.ts";

type Options = Omit<Parameters<typeof createWorld>[0] & object, "watch" | "seed">;

/** By name: plays one world from its beginning to its end, and tells every effect of its machines. */
export const WORLDS = new Map<string, (watch: Watch) => void>();

/** Adds one. */
export function world(name: string, options: Options, play: (world: World) => void): void {
  if (WORLDS.has(name)) throw new Error(`Two worlds are called "${name}"`);
  WORLDS.set(name, (watch) => play(createWorld({ seed: name, watch, ...options })));
}

// ---------------------------------------------------------------------------------------------------- what people do

export const EIM: PlayerOptions = { nat: "EIM+APDF random" };

/** Alice and bob, logged in and at rest. */
export function pair(world: World, one: PlayerOptions = EIM, other: PlayerOptions = EIM): [Player, Player] {
  const alice = join(world, "alice", one), bob = join(world, "bob", other);
  login(world, alice, bob);
  world.net.run(1_000);
  return [alice, bob];
}

/** The same computer, another process. */
export const again = (world: World, { name, host, nat }: Player, options: PlayerOptions = {}) =>
  join(world, name, { host, nat, ...options });

/** So many messages each way, `everyMs`. */
export function talk(world: World, alice: Player, bob: Player, { count = 5, everyMs = 200 } = {}): void {
  for (let i = 0; i < count; i++) {
    alice.send(bob.name, `a ${i}`);
    world.net.run(everyMs / 2);
    bob.send(alice.name, `b ${i}`);
    world.net.run(everyMs / 2);
  }
}

/** Asks all that can be asked. */
export function ask(world: World, player: Player, peer: string): void {
  player.command({ command: "ping", peer, count: 3 });
  player.command({ command: "path", peer });
  player.command({ command: "path", peer: null });
  player.command({ command: "nat" });
  player.command({ command: "getu", prefix: "" });
  player.command({ command: "verify", peer });
  world.net.run(3_000);
}

/** A stream of numbers below a limit. */
export const dice = (seed: string, next = random(seed)) => (limit: number) => Math.floor(next() * limit);
export const part = (length: number) => "0123456789abcdef".repeat(Math.ceil(length / 16)).slice(0, length);
/** It takes a quarter of a second. */
function once<T>(make: (words: string) => T): (words: string) => T {
  const made = new Map<string, T>();
  return (words) => made.get(words) ?? (made.set(words, make(words)), made.get(words)!);
}
export const psk = once((words) => keyFromWords(words, "secret")),
  password = once((words) => keyFromWords(words, "password"));
const place = (name: string, address: string, delayMs = DELAY_MS) => ({ name, address, delayMs });

// ---------------------------------------------------------------------------------------------------- 91 pairs of NATs

KINDS.forEach((one, i) =>
  KINDS.slice(i).forEach((other, j) =>
    world(`pair: ${one} x ${other}`, { jitterMs: j % 2 ? 5 : 0 }, (world) => {
      const [alice, bob] = [join(world, "alice", site(world, one)), join(world, "bob", site(world, other))];
      login(world, alice, bob);
      world.net.run(3_000);
      const [caller, called] = j % 3 ? [alice, bob] : [bob, alice];
      caller.send(called.name, "hi");
      world.net.run(14_000);
      talk(world, alice, bob);
      ask(world, alice, "bob");
    })
  )
);

// ---------------------------------------------------------------------------------------------------- the weather

const WEATHER: [string, Partial<NetworkOptions>][] = [
  ["loss 5 %", { loss: 0.05 }],
  ["loss 30 %", { loss: 0.3 }],
  ["jitter", { jitterMs: 60 }],
  ["copies", { duplicate: 0.5 }],
  ["out of order", { reorder: 0.3, reorderMs: 150 }],
  ["all of it", { loss: 0.3, duplicate: 0.3, reorder: 0.3, jitterMs: 20 }],
];
for (const [weather, conditions] of WEATHER) {
  for (const [one, other] of [["EIM+APDF random", "linux drop"], ["APDM+APDF random", "APDM+APDF random"]] as const) {
    world(`weather: ${weather}, ${one} x ${other}`, {}, (world) => {
      const [alice, bob] = pair(world, { nat: one }, { nat: other });
      world.net.conditions = conditions;
      talk(world, alice, bob, { count: 20, everyMs: 150 });
      alice.send("bob", part(20_000));
      world.net.run(20_000);
    });
  }
}
world("weather: login at 30 % loss", { loss: 0.3, jitterMs: 10 }, (world) => {
  const players = ["alice", "bob", "carol"].map((name) => join(world, name, EIM));
  world.net.run(20_000);
  for (const player of players) player.send("alice", `from ${player.name}`);
  world.net.run(20_000);
});
world("weather: lan", { loss: 0.1 }, (world) => {
  const nat = world.net.nat({ ...NATS["linux drop"]!, ...place("home", "203.0.113.9") });
  const [alice, bob] = pair(world, { nat }, { nat });
  talk(world, alice, bob, { count: 10 });
  ask(world, alice, "bob");
});

// ---------------------------------------------------------------------------------------------------- a path's life

/** A program that holds a socket, and does nothing. */
const IDLE: Machine<never> = { opened: () => [], receive: () => [], wake: () => [], wakeAt: () => Infinity };

export const SERVER = "192.0.2.1:2280";
export const isServers = (endpoint: Endpoint) => endpoint.startsWith("192.0.2.1");
/** Nothing but what comes from the server, or goes to it, passes. */
export const blockDirect = ({ net }: World) => net.block(({ from, to }) => !isServers(from) && !isServers(to));
/** A cable is out for so long. */
export function cutOff({ net }: World, player: Player, ms: number): void {
  const { addresses } = player.nat ?? player.host;
  const isTheirs = (endpoint: Endpoint) => addresses.some((address) => endpoint.startsWith(`${address}:`));
  net.after(ms, net.block(({ from, to }) => isTheirs(from) || isTheirs(to)));
}

for (const nat of ["EIM+APDF random", "APDM+APDF sequential"]) {
  world(`path: both NATs forget everything while they talk, ${nat}`, {}, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob, { count: 15 });
    for (const { nat } of [alice, bob]) nat!.flush();
    talk(world, alice, bob, { count: 30 });
  });
  world(`path: an address changes, ${nat}`, { jitterMs: 3 }, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob, { count: 15 });
    alice.nat!.readdress("203.0.114.77");
    talk(world, alice, bob, { count: 30 });
    bob.nat!.readdress("203.0.114.78");
    world.net.run(30_000);
    talk(world, alice, bob);
  });
  world(`path: dies and may come back, ${nat}`, {}, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob, { count: 10 });
    const unblock = blockDirect(world);
    talk(world, alice, bob, { count: 30 });
    unblock();
    talk(world, alice, bob, { count: 30, everyMs: 500 });
  });
  world(`path: one that was warm goes idle for 6 minutes, ${nat}`, { jitterMs: 2 }, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob);
    world.net.run(360_000);
    talk(world, alice, bob);
    world.net.run(400_000);
    for (const { nat } of [alice, bob]) nat!.flush();
    talk(world, alice, bob, { count: 10 });
  });
}
world("path: idle for 6 minutes on the relay", {}, (world) => {
  const nat = "APDM+APDF random", [alice, bob] = pair(world, { nat }, { nat });
  talk(world, alice, bob);
  world.net.run(360_000);
  talk(world, alice, bob);
  world.net.run(20_000);
});
world("path: mappings of 60 s, renewed in time, EIM", {}, (world) => {
  const nat = (name: string, address: string) =>
    world.net.nat({ ...NATS["EIM+APDF random"]!, absoluteLifetimeMs: 60_000, ...place(name, address) });
  const [alice, bob] = pair(world, { nat: nat("a", "203.0.114.1") }, { nat: nat("b", "203.0.114.2") });
  for (let i = 0; i < 60; i++) {
    talk(world, alice, bob, { count: 1 });
    world.net.run(6_000);
  }
});
world("path: mappings of 60 s, renewed in time, sequential x EIM", { loss: 0.02 }, (world) => {
  const nat = (kind: string, name: string, address: string) =>
    world.net.nat({ ...NATS[kind]!, absoluteLifetimeMs: 60_000, ...place(name, address) });
  const [alice, bob] = pair(world, { nat: nat("APDM+APDF sequential", "a", "203.0.114.1") }, {
    nat: nat("EIM+APDF random", "b", "203.0.114.2"),
  });
  for (let i = 0; i < 60; i++) {
    talk(world, alice, bob, { count: 1 });
    world.net.run(6_000);
  }
});
world("path: mappings of 60 s, cellular x EIM", {}, (world) => {
  const [alice, bob] = pair(world, { nat: "cellular" });
  for (let i = 0; i < 30; i++) {
    talk(world, alice, bob, { count: 1 });
    world.net.run(8_000);
  }
});
for (const outageMs of [2_000, 6_000, 15_000, 90_000]) {
  world(`path: one is cut off for ${outageMs} ms`, {}, (world) => {
    const [alice, bob] = pair(world);
    talk(world, alice, bob);
    cutOff(world, bob, outageMs);
    talk(world, alice, bob, { count: 10 });
    world.net.run(outageMs);
    talk(world, alice, bob, { count: 10 });
    world.net.run(40_000);
    talk(world, alice, bob);
  });
}
world("path: roaming from a LAN to another network and back", {}, (world) => {
  const nat = world.net.nat({ ...NATS["EIM+APDF random"]!, ...place("home", "203.0.113.9") });
  const away = world.net.nat({ ...NATS["linux drop"]!, ...place("hotspot", "203.0.115.9", 50) });
  const [alice, bob] = pair(world, { nat, address: "192.168.1.2" }, { nat, address: "192.168.1.3" });
  const move = (address: string, behind: Nat) => {
    bob.host.move({ addresses: [address], behind });
    bob.process.call((now) => bob.client.interfaces([address], now));
  };
  talk(world, alice, bob, { count: 10 });
  move("10.1.1.7", away);
  talk(world, alice, bob, { count: 30 });
  world.net.run(20_000);
  talk(world, alice, bob);
  move("192.168.1.3", nat);
  talk(world, alice, bob, { count: 30 });
  world.net.run(20_000);
  talk(world, alice, bob);
  bob.process.call((now) => bob.client.interfaces(["192.168.1.3"], now));
});
world("path: a quicker one takes over", {}, (world) => {
  const nat = world.net.nat({
    ...NATS["EIM+APDF random"]!,
    hairpin: true,
    ...place("home", "203.0.113.9"),
    lanDelayMs: 40,
  });
  const home = (name: string, address: string) =>
    world.net.nat({ ...NATS["EIM+EIF preserving"]!, name, address, behind: nat });
  const [alice, bob] = pair(world, { nat: home("a", "100.64.0.2") }, { nat: home("b", "100.64.0.3") });
  talk(world, alice, bob, { count: 10 });
  alice.host.move({ addresses: alice.host.addresses.slice(), behind: nat });
  talk(world, alice, bob, { count: 30 });
});
for (const jumpMs of [4_000, 20_000, 3_600_000]) {
  world(`clock: jumps by ${jumpMs} ms`, {}, (world) => {
    const [alice, bob] = pair(world);
    talk(world, alice, bob);
    alice.send("bob", part(5_000));
    alice.jump(jumpMs);
    talk(world, alice, bob, { count: 10 });
    world.net.run(20_000);
    bob.jump(jumpMs);
    talk(world, alice, bob, { count: 10 });
    world.net.run(60_000);
    talk(world, alice, bob);
  });
}
for (const afterMs of [90, 130, 170, 250]) {
  world(`clock: jumps ${afterMs} ms after a call`, {}, (world) => {
    const [alice, bob] = pair(world);
    alice.send("bob", "hi");
    world.net.run(afterMs);
    for (const player of [alice, bob]) player.jump(20_000);
    talk(world, alice, bob, { count: 10 });
    world.net.run(20_000);
  });
}
world("clock: wakes in vain", {}, (world) => {
  const [alice, bob] = pair(world);
  for (let i = 0; i < 100; i++) {
    if (i % 10 === 0) talk(world, alice, bob, { count: 1 });
    for (const player of [alice, bob]) player.process.call((now) => player.client.wake(now));
    world.server.call((now) => world.machine.wake(now));
    world.net.run(i % 9 * 20 + 1);
  }
});
world("clock: jumps while somebody logs in", {}, (world) => {
  const alice = join(world, "alice", EIM), bob = join(world, "bob", EIM);
  world.net.run(100);
  alice.jump(60_000);
  world.net.run(3_000);
  bob.send("alice", "hi");
  world.net.run(5_000);
});
for (
  const [name, options] of [["one side", [{ direct: false }, EIM]], ["both", [{ direct: false }, {
    direct: false,
  }]]] as const
) {
  world(`relay: no direct path wanted, ${name}`, {}, (world) => {
    const [alice, bob] = pair(world, ...options);
    talk(world, alice, bob, { count: 10 });
    ask(world, alice, "bob");
    world.net.run(60_000);
    talk(world, bob, alice);
  });
}
world("relay: a conversation of ten minutes, a message each minute", {}, (world) => {
  const nat = "linux random", [alice, bob] = pair(world, { nat }, { nat });
  for (let i = 0; i < 10; i++) {
    talk(world, alice, bob, { count: 1 });
    world.net.run(60_000);
  }
});

// ---------------------------------------------------------------------------------------------------- sprays and sequences

for (const rate of [0.2, 1, 10]) {
  for (const other of ["EIM+APDF random", "APDM+APDF sequential"]) {
    world(
      `harder: sequential with ${rate} foreign flows per second x ${other}`,
      { loss: 0.01, jitterMs: 5 },
      (world) => {
        const sites = [site(world, "APDM+APDF sequential"), site(world, other)];
        for (const { nat } of sites) Object.assign(nat!.options, { foreignRate: rate });
        const [alice, bob] = pair(world, sites[0], sites[1]);
        talk(world, alice, bob, { count: 50, everyMs: 300 });
      },
    );
  }
}
for (const other of ["EIM+APDF random", "APDM+APDF sequential"]) {
  world(`harder: a neighbour's flow takes a port between the samples of a sequence, x ${other}`, {}, (world) => {
    const { nat } = site(world, "APDM+APDF sequential"), ports = new Set<Endpoint>();
    const place = { name: "neighbour", addresses: ["192.168.77.11"], behind: nat! };
    const neighbour = world.net.host(place).run(IDLE);
    world.net.trace = ({ fate, host, from, to }) => {
      if (fate !== "sent" || host !== "alice" || to !== SERVER || ports.has(from)) return;
      ports.add(from);
      if (ports.size !== 4) return; // the third sample: socket 0 came first
      neighbour.perform([{ kind: "send", socket: 0, to: "198.18.5.5:5", data: new Uint8Array(1) }]);
    };
    const [alice, bob] = pair(world, { nat }, { nat: other });
    talk(world, alice, bob, { count: 20, everyMs: 300 });
    alice.command({ command: "nat" });
  });
}
world("harder: a sequence in steps of -2 x preserving", {}, (world) => {
  const nat = world.net.nat({ ...NATS["APDM+APDF sequential"]!, step: -2, ...place("n", "203.0.114.1") });
  const [alice, bob] = pair(world, { nat }, { nat: "APDM+APDF preserving" });
  talk(world, alice, bob, { count: 20, everyMs: 300 });
});
for (
  const [one, other] of [["APDM+APDF random", "EIM+APDF random"], ["cgn symmetric", "EIM+APDF random"], [
    "cgn symmetric",
    "linux accept",
  ]] as const
) {
  for (const isBlocked of [false, true]) {
    world(`harder: spray, ${one} x ${other}${isBlocked ? ", which fails" : ""}`, {}, (world) => {
      const [alice, bob] = pair(world, { nat: one }, { nat: other });
      world.net.run(4_000);
      const unblock = isBlocked ? blockDirect(world) : () => {};
      talk(world, alice, bob, { count: 40, everyMs: 500 });
      world.net.run(80_000);
      unblock();
      talk(world, alice, bob, { count: 40, everyMs: 500 });
    });
  }
}
world("harder: one client, three sprays at a time", {}, (world) => {
  const alice = join(world, "alice", EIM);
  const others = ["bob", "carol", "dave"].map((name) => join(world, name, { nat: "APDM+APDF random" }));
  login(world, alice, ...others);
  world.net.run(4_000);
  for (const { name } of others) alice.send(name, "hi");
  world.net.run(60_000);
});
world("harder: symmetric client with many peers has no sockets left", {}, (world) => {
  const alice = join(world, "alice", { nat: "APDM+APDF random" });
  const others = Array.from({ length: 5 }, (_, i) => join(world, `peer-${i}`, EIM));
  login(world, alice, ...others);
  world.net.run(4_000);
  for (const { name } of others) alice.send(name, "hi");
  world.net.run(60_000);
});
world("harder: a host that has few sockets", {}, (world) => {
  const nat = world.net.nat({ ...NATS["APDM+APDF random"]!, ...place("n", "203.0.114.1") });
  const host = world.net.host({ name: "alice", addresses: ["192.168.77.10"], behind: nat, maxSockets: 12 });
  const [alice, bob] = pair(world, { nat, host });
  talk(world, alice, bob, { count: 20, everyMs: 500 });
});
world("harder: a host that has one socket", {}, (world) => {
  const nat = world.net.nat({ ...NATS["APDM+APDF sequential"]!, ...place("n", "203.0.114.1") });
  const host = world.net.host({ name: "alice", addresses: ["192.168.77.10"], behind: nat, maxSockets: 1 });
  const [alice, bob] = pair(world, { nat, host });
  talk(world, alice, bob, { count: 20, everyMs: 500 });
});
for (const kind of ["ADM+ADF", "ADM+APDF"]) {
  for (const allocation of ["preserving", "sequential", "random"]) {
    world(`harder: ${kind} ${allocation}, which one server cannot tell`, {}, (world) => {
      const [alice, bob] = pair(world, { nat: `${kind} ${allocation}` }, { nat: "EIM+APDF random" });
      talk(world, alice, bob, { count: 20, everyMs: 500 });
      world.net.run(30_000);
    });
  }
}
world("harder: sequential, who calls in the moment of the login", { jitterMs: 10 }, (world) => {
  const bob = join(world, "bob", { nat: "APDM+APDF preserving" });
  login(world, bob);
  world.net.run(5_000);
  const alice = join(world, "alice", { nat: "APDM+APDF sequential" });
  login(world, alice);
  talk(world, alice, bob, { count: 20 });
});
world("harder: two symmetric ones behind one NAT that does not hairpin", {}, (world) => {
  const nat = world.net.nat({ ...NATS["APDM+APDF random"]!, ...place("carrier", "203.0.114.1") });
  const home = (name: string, address: string) => ({
    nat: world.net.nat({ ...NATS["linux drop"]!, name, address, behind: nat }),
  });
  const [alice, bob] = pair(world, home("a", "100.64.0.2"), home("b", "100.64.0.3"));
  world.net.run(3_000);
  talk(world, alice, bob, { count: 20, everyMs: 500 });
});

// ---------------------------------------------------------------------------------------------------- one site, IPv6

for (const hairpin of [false, true, "internal"] as const) {
  world(`site: one LAN, hairpin ${hairpin}`, {}, (world) => {
    const nat = world.net.nat({ ...NATS["EIM+APDF random"]!, hairpin, ...place("home", "203.0.113.9") });
    const [alice, bob] = pair(world, { nat, address: "192.168.1.2" }, { nat, address: "192.168.1.3" });
    talk(world, alice, bob);
    ask(world, alice, "bob");
  });
  world(`site: one carrier, hairpin ${hairpin}`, {}, (world) => {
    const carrier = world.net.nat({ ...NATS["EIM+APDF random"]!, hairpin, ...place("carrier", "203.0.113.8") });
    const home = (name: string, address: string) => ({
      nat: world.net.nat({ name, address, behind: carrier, ...NATS["EIM+APDF random"]! }),
      address: "192.168.1.2",
    });
    const [alice, bob] = pair(world, home("a", "100.64.0.2"), home("b", "100.64.0.3"));
    talk(world, alice, bob, { count: 20, everyMs: 500 });
    ask(world, bob, "alice");
  });
}
world("site: two clients on one host", {}, (world) => {
  const alice = join(world, "alice", EIM), bob = join(world, "bob", { host: alice.host, nat: alice.nat });
  login(world, alice, bob);
  talk(world, alice, bob);
  ask(world, alice, "bob");
});
world("site: two clients on the server's own host", {}, (world) => {
  const place = { host: world.serverHost, address: "192.168.3.3", servers: ["127.0.0.1:2280"] };
  const alice = join(world, "alice", place), bob = join(world, "bob", place), carol = join(world, "carol", EIM);
  login(world, alice, bob, carol);
  talk(world, alice, bob);
  talk(world, alice, carol);
  ask(world, alice, "bob");
});
const v6 = (name: string, nat: string | null = "EIM+APDF random") => ({ nat, v6: `2001:db8:${name}::1` });
world("IPv6: both have it, and symmetric NATs", { v6: true }, (world) => {
  const [alice, bob] = pair(world, v6("a", "APDM+APDF random"), v6("b", "APDM+APDF random"));
  talk(world, alice, bob, { count: 20 });
  ask(world, alice, "bob");
  world.net.run(60_000);
  talk(world, alice, bob);
});
world("IPv6: one has it", { v6: true }, (world) => {
  const [alice, bob] = pair(world, v6("a"), EIM);
  talk(world, alice, bob, { count: 20 });
  world.net.run(60_000);
});
world("IPv6: the server's IPv4 does not answer", { v6: true }, (world) => {
  world.net.block(({ from, to }) => isServers(from) || isServers(to));
  const [alice, bob] = pair(world, v6("a", null), v6("b"));
  talk(world, alice, bob);
  ask(world, alice, "bob");
  world.net.run(60_000);
});
world("IPv6: dies in mid-conversation, then IPv4 does", { v6: true }, (world) => {
  const [alice, bob] = pair(world, v6("a"), v6("b"));
  talk(world, alice, bob);
  const unblock = world.net.block(({ to }) => to.startsWith("["));
  talk(world, alice, bob, { count: 30 });
  unblock();
  world.net.block(({ to }) => !to.startsWith("["));
  talk(world, alice, bob, { count: 60, everyMs: 1_000 });
});
world("IPv6: the same /64", { v6: true }, (world) => {
  const [alice, bob] = pair(world, { nat: "linux drop", v6: "2001:db8:c::1" }, {
    nat: "linux drop",
    v6: "2001:db8:c::2",
  });
  talk(world, alice, bob, { count: 10 });
});

// ---------------------------------------------------------------------------------------------------- the server

for (const nat of ["EIM+APDF random", "APDM+APDF random"]) {
  world(`server: restarted, ${nat}`, {}, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob);
    alice.command({ command: "getu", prefix: "" });
    world.restartServer();
    talk(world, alice, bob, { count: 60 });
    ask(world, alice, "bob");
    world.server.stop();
    alice.command({ command: "getu", prefix: "bo" });
    bob.command({ command: "verify", peer: "alice" });
    world.net.run(1_000);
    world.restartServer();
    talk(world, alice, bob, { count: 60 });
  });
  world(`server: gone for three minutes, ${nat}`, { jitterMs: 4 }, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob);
    world.server.stop();
    talk(world, alice, bob, { count: 60, everyMs: 1_000 });
    ask(world, alice, "bob");
    world.net.run(120_000);
    world.restartServer();
    talk(world, alice, bob, { count: 30, everyMs: 1_000 });
  });
  world(`server: says that it goes, ${nat}`, {}, (world) => {
    const [alice, bob] = pair(world, { nat }, { nat });
    talk(world, alice, bob);
    world.server.perform(world.machine.stop());
    world.restartServer();
    talk(world, alice, bob, { count: 20 });
    world.server.perform(world.machine.stop());
    world.server.stop();
    world.net.run(10_000);
    world.restartServer();
    talk(world, alice, bob, { count: 20 });
  });
}
world("server: out of one's reach, and forgets him", {}, (world) => {
  const [alice, bob] = pair(world);
  talk(world, alice, bob);
  const unblock = world.net.block(({ host, to }) => host === "alice" && isServers(to));
  talk(world, alice, bob, { count: 80, everyMs: 1_000 });
  unblock();
  talk(world, alice, bob, { count: 40, everyMs: 1_000 });
});
world("server: a first message while it is just back and the other one is not", {}, (world) => {
  const [alice, bob] = pair(world);
  const unblock = world.net.block(({ host, to }) => host === "bob" || to.startsWith(bob.nat!.addresses[0]!));
  world.restartServer();
  world.net.runUntil(() => alice.events("reconnected").length > 0, 60_000);
  alice.send("bob", "are you back?");
  world.net.run(3_000);
  unblock();
  world.net.run(30_000);
});
world("server: a lost WELCOME and a minute without a network", {}, (world) => {
  const [alice, bob] = pair(world);
  world.restartServer();
  let until = 0;
  world.net.tap(({ data }) => {
    if (until === 0 && decode(data)?.type === "WELCOME") until = world.net.now() + 65_000;
    if (world.net.now() < until) return "drop";
  });
  world.net.run(130_000);
  talk(world, alice, bob);
});
world("server: a lost WELCOME, and a NAT that forgets", {}, (world) => {
  let welcomes = 0;
  world.net.tap(({ data }) => {
    if (decode(data)?.type !== "WELCOME" || ++welcomes > 2) return;
    if (welcomes === 2) return void bob.send("alice", "welcome");
    alice.nat!.flush();
    return "drop";
  });
  const bob: Player = join(world, "bob");
  const alice = join(world, "alice", { ...EIM, patient: true });
  world.net.run(10_000);
  talk(world, alice, bob);
});
world("server: never answers", {}, (world) => {
  world.server.stop();
  const alice = join(world, "alice"), bob = join(world, "bob", { patient: true });
  for (const player of [alice, bob]) player.send("carol", "are you there?"), player.command({ command: "nat" });
  for (const player of [alice, bob]) player.command({ command: "getu", prefix: "" });
  alice.command({ command: "ping", peer: "bob", count: 2 });
  alice.command({ command: "path", peer: null });
  bob.command({ command: "ping", peer: "alice", count: 2 });
  world.net.run(60_000);
  world.restartServer();
  world.net.run(20_000);
  alice.send("bob", "too late");
});
world("server: does not answer with the list", {}, (world) => {
  const [alice, bob] = pair(world);
  const unblock = world.net.block(({ data }) => decode(data)?.type === "USERS");
  ask(world, alice, "bob");
  world.net.run(10_000);
  unblock();
  ask(world, alice, "bob");
  talk(world, alice, bob);
});
world("server: its answers to keepalives alone are lost", {}, (world) => {
  const [alice, bob] = pair(world, { direct: false }, { direct: false });
  const unblock = world.net.block(({ host, data }) => host === "server" && decode(data)?.type === "ALIVE");
  talk(world, alice, bob, { count: 60, everyMs: 1_000 });
  world.net.run(60_000);
  unblock();
  world.net.run(60_000);
});
world("server: seemed to be gone", {}, (world) => {
  const [alice, bob] = pair(world);
  talk(world, alice, bob);
  let late: { from: Endpoint; to: Endpoint; data: Uint8Array } | null = null;
  const untap = world.net.tap(({ host, from, to, data }) => {
    if (host !== "server" || !to.startsWith(alice.nat!.addresses[0]!)) return;
    if (decode(data)?.type === "ALIVE") late = { from, to, data: data.slice() };
    return "drop";
  });
  world.net.runUntil(() => alice.events("reconnecting").length > 0, 60_000);
  world.net.inject(late!);
  untap();
  talk(world, alice, bob);
});
world("server: its third port is somebody else's", {}, (world) => {
  world.server.stop();
  world.serverHost.run(IDLE, { ports: [2282] });
  world.restartServer();
  const [alice, bob] = pair(world, EIM, { nat: "EIM+EIF random" });
  talk(world, alice, bob);
  ask(world, alice, "bob");
});
world("server: clients come and go for two minutes, and vanish", {}, (world) => {
  const players = Array.from({ length: 10 }, (_, i) => join(world, `user-${i}`, i % 2 ? EIM : {}));
  login(world, ...players);
  players.slice(0, 5).forEach((player) => player.process.stop());
  players[5]!.command({ command: "exit" });
  world.net.run(70_000);
  const [alice] = players.slice(-1);
  for (const { name } of players) alice!.send(name, "hi");
  alice!.command({ command: "getu", prefix: "user" });
  world.net.run(3_700_000);
  alice!.send("user-0", "an hour later");
  world.net.run(5_000);
});
world("server: everybody leaves, and it rests", {}, (world) => {
  const [alice, bob] = pair(world);
  for (const player of [alice, bob]) player.command({ command: "exit" });
  alice.send("bob", "after the end");
  world.net.run(4_000_000);
});
world("server: is full", { server: { maxUsers: 2, maxPerAddress: 1 } }, (world) => {
  const alice = join(world, "alice"), bob = join(world, "bob", { address: "198.51.100.77" });
  world.net.run(2_000);
  const carol = join(world, "carol", { address: "203.0.120.1" });
  world.net.run(5_000);
  const dave = join(world, "dave", { address: "203.0.121.1" });
  world.net.run(5_000);
  for (const player of [alice, bob, carol, dave]) player.command({ command: "getu", prefix: "" });
  world.net.run(5_000);
});
for (const [what, words] of [["right", "open sesame"], ["wrong", "open barley"], ["missing", ""]] as const) {
  world(`server: password ${what}`, { server: { password: password("open sesame") } }, (world) => {
    const alice = join(world, "alice", { ...EIM, password: () => password("open sesame") });
    const bob = join(world, "bob", words ? { password: () => password(words) } : {});
    world.net.run(5_000);
    talk(world, alice, bob);
  });
}
world("server: two addresses", { server: { hosts: ["192.0.2.1", "192.0.2.2"] } }, (world) => {
  const kinds = ["EIM+EIF random", "EIM+ADF random", "EIM+APDF random", "ADM+APDF random", "ADM+ADF sequential"];
  const players = [...kinds, null].map((nat, i) => join(world, `user-${i}`, { nat }));
  login(world, ...players);
  world.net.run(3_000);
  for (const player of players) player.command({ command: "nat" });
  for (const player of players.slice(1)) talk(world, players[0]!, player);
  world.net.run(10_000);
});
world("server: a second observer", {}, (world) => {
  const host = world.net.host({ name: "observer", addresses: ["192.0.9.1"], delayMs: DELAY_MS });
  startServer(world, host);
  const kinds = ["EIM+EIF random", "EIM+APDF random", "ADM+APDF random", "ADM+ADF sequential", "APDM+APDF random"];
  const players = kinds.map((nat, i) => join(world, `user-${i}`, { nat, observer: "192.0.9.1:2280" }));
  players.push(join(world, "lonely", { ...EIM, observer: "192.0.9.9:2280" }));
  login(world, ...players);
  for (const player of players) player.command({ command: "nat" });
  world.net.run(3_000);
  for (const player of players.slice(1)) talk(world, players[0]!, player);
  world.net.run(10_000);
});

// ---------------------------------------------------------------------------------------------------- everything at once

for (let seed = 0; seed < 30; seed++) {
  world(`chaos: ${seed}`, {}, (world) => {
    const kinds = [
      "EIM+APDF random",
      "EIM+EIF preserving",
      "APDM+APDF random",
      "APDM+APDF sequential",
      "EIM+ADF random",
    ];
    const below = dice(`chaos ${seed}`), pick = <T>(values: readonly T[]) => values[below(values.length)]!;
    const names = ["alice", "bob"] as const, direct = below(10) < 7, hasJumped = [false, false];
    const keys = names.map(() => world.keys()),
      options = (who: number) => ({ direct, keys: keys[who]!, patient: true });
    const now = names.map((name, who) => join(world, name, { nat: pick(kinds), ...options(who) }));
    login(world, ...now);
    const say = (who: number, length: number) => now[who]!.send(names[1 - who]!, part(length));
    const acts: ((who: number) => void)[] = [
      ...Array<(who: number) => void>(5).fill((who) => {
        for (let i = 0; i < 3; i++) say(who, 1 + below(below(5) ? 50 : 6_000));
      }),
      (who) => now[who]!.command({ command: "ping", peer: names[1 - who]!, count: 1 + below(3) }),
      () =>
        world.net.conditions = {
          loss: pick([0, 0, 0.05, 0.3, 0.6]),
          duplicate: pick([0, 0.3]),
          reorder: pick([0, 0.3]),
          jitterMs: pick([0, 7]),
        },
      (who) => now[who]!.nat!.flush(),
      () => world.restartServer(),
      (who) => world.net.after(below(6_000), world.net.block(({ host }) => host === names[who])),
      (who) => { // a new process knows nothing of a clock that has jumped: it would log in with an older one
        if (hasJumped[who]) return;
        if (below(2)) now[who]!.command({ command: "exit" });
        world.net.run(below(300));
        now[who]!.process.stop();
        now[who] = again(world, now[who]!, options(who));
      },
      (who) => {
        hasJumped[who] = true;
        now[who]!.jump(pick([1_000, 60_000, 3_600_000]));
      },
    ];
    for (let i = 0; i < 40; i++) {
      pick(acts)(below(2));
      world.net.run(below(10) < 3 ? below(8_000) : below(300));
    }
    world.net.conditions = {};
    world.net.run(60_000);
    for (const who of [0, 1]) say(who, 10);
    world.net.run(20_000);
  });
}
