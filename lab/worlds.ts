/**
 * The worlds of the oracle: about 200 small histories, named and seeded, which together have server.ts and client.ts
 * do all that they can do. What they find is not judged here: `oracle.ts` takes the hash of every effect.
 *
 * @module
 */
import { NATS, type NetworkOptions } from "./network.ts";
import type { Player, PlayerOptions, Watch, World } from "./scenario.ts";
import { createWorld, DELAY_MS, join, KINDS, login, site } from "./scenario.ts";

type Options = Omit<Parameters<typeof createWorld>[0] & object, "watch" | "seed">;

/** By name: plays one world from its beginning to its end, and tells every effect of its machines. */
export const WORLDS = new Map<string, (watch: Watch) => void>();

function world(name: string, options: Options, play: (world: World) => void): void {
  if (WORLDS.has(name)) throw new Error(`Two worlds are called "${name}"`);
  WORLDS.set(name, (watch) => play(createWorld({ seed: name, watch, ...options })));
}

// ---------------------------------------------------------------------------------------------------- what people do

const EIM: PlayerOptions = { nat: "EIM+APDF random" };

/** Alice and bob, logged in and at rest. */
function pair(world: World, one: PlayerOptions = EIM, other: PlayerOptions = EIM): [Player, Player] {
  const alice = join(world, "alice", one), bob = join(world, "bob", other);
  login(world, alice, bob);
  world.net.run(1_000);
  return [alice, bob];
}

/** So many messages each way, `everyMs`. */
function talk(world: World, alice: Player, bob: Player, { count = 5, everyMs = 200 } = {}): void {
  for (let i = 0; i < count; i++) {
    alice.send(bob.name, `a ${i}`);
    world.net.run(everyMs / 2);
    bob.send(alice.name, `b ${i}`);
    world.net.run(everyMs / 2);
  }
}

/** Asks all that can be asked. */
function ask(world: World, player: Player, peer: string): void {
  player.command({ command: "ping", peer, count: 3 });
  player.command({ command: "path", peer });
  player.command({ command: "path", peer: null });
  player.command({ command: "nat" });
  player.command({ command: "getu", prefix: "" });
  player.command({ command: "verify", peer });
  world.net.run(3_000);
}

const part = (length: number) => "0123456789abcdef".repeat(Math.ceil(length / 16)).slice(0, length);
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
