/**
 * Through every NAT that mathematics allows: the 91 pairs of 13 kinds of NAT, what each costs, and what each of them
 * is found to be.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { NATS } from "./network.ts";
import { createWorld, D, DELAY_MS, join, KINDS, login, type Player, R, site, type World } from "./scenario.ts";

const isSymmetric = (kind: string) => kind.startsWith("APDM") || kind === "linux random";
const isRandom = (kind: string) => kind === "APDM+APDF random" || kind === "linux random";
/** All but those with random ports on one side and a symmetric NAT on the other. */
const isPossible = (one: string, other: string) =>
  !(isSymmetric(one) && isSymmetric(other) && (isRandom(one) || isRandom(other)));

interface Weather {
  foreignRate?: number;
  loss?: number;
  jitterMs?: number;
}

function call(one: string, other: string, seed: number, { foreignRate = 0, ...conditions }: Weather = {}) {
  const world = createWorld({ seed, ...conditions });
  const sites = [site(world, one), site(world, other)] as const;
  if (foreignRate) { for (const { nat } of sites) Object.assign(nat!.options, { foreignRate }); }
  const alice = join(world, "alice", sites[0]), bob = join(world, "bob", sites[1]);
  login(world, alice, bob);
  world.net.run(3_000);
  const start = world.net.now();
  alice.send("bob", "hi");
  return { world, alice, bob, start };
}

/** When both sides have a direct path, in ms since the call; Infinity if not within the limit. */
function directAfter({ world, alice, bob, start }: ReturnType<typeof call>, limitMs: number): number {
  const isDirect = () => alice.path() !== "relay" && bob.path() !== "relay";
  return world.net.runUntil(isDirect, limitMs) ? world.net.now() - start : Infinity;
}

for (const [i, one] of KINDS.entries()) {
  for (const other of KINDS.slice(i)) {
    test(`${one} x ${other}: ${isPossible(one, other) ? "direct" : "over the relay"}, whoever calls`, () => {
      for (const [caller, called] of one === other ? [[one, other]] : [[one, other], [other, one]]) {
        for (const seed of [0, 1, 3]) { // with 2 the spray misses, as in one world of 2,000
          const round = call(caller!, called!, seed);
          const after = directAfter(round, isPossible(one, other) ? 14_000 : 20_000);
          const { world, alice, bob, start } = round;
          assert.equal(after < Infinity, isPossible(one, other), `seed ${seed}, ${caller} calls`);
          assert.equal(bob.events("message")[0]!.at - start, R);
          world.net.run(2_000);
          alice.send("bob", "one more");
          bob.send("alice", "and one back");
          world.net.run(2_000);
          assert.deepEqual(bob.events("message").map(({ text }) => text), ["hi", "one more"]);
          assert.deepEqual(alice.events("message").map(({ text }) => text), ["and one back"]);
          const path = isPossible(one, other) ? "direct" : "relay";
          assert.deepEqual([bob.events("message")[1]!.path, alice.events("message")[0]!.path], [path, path]);
        }
      }
    });
  }
}

// ---------------------------------------------------------------------------------------------------- budgets

const quantile = (values: number[], q: number) => values.sort((a, b) => a - b)[Math.ceil(q * values.length) - 1]!;
const measure = (
  one: string,
  other: string,
  { seeds = 1_000, limitMs = 15_000, ...weather }: Weather & { seeds?: number; limitMs?: number } = {},
) =>
  Array.from({ length: seeds }, (_, seed) => {
    const [caller, called] = seed % 2 ? [one, other] : [other, one];
    return directAfter(call(caller!, called!, seed, weather), limitMs);
  });

const BUDGETS: [string, string, number][] = [
  ["EIM+APDF random", "EIM+APDF random", 1.05],
  ["linux drop", "EIM+APDF preserving", 1.05],
  ["APDM+APDF sequential", "EIM+APDF random", 3],
  ["APDM+APDF preserving", "EIM+APDF random", 3],
  ["APDM+APDF preserving", "APDM+APDF preserving", 3],
  ["APDM+APDF preserving", "APDM+APDF sequential", 3],
  ["APDM+APDF sequential", "APDM+APDF sequential", 5],
];
for (const [one, other, budget] of BUDGETS) {
  test(`${one} x ${other} is direct within ${budget} (R + D) in the median`, () => {
    const median = quantile(measure(one, other), 0.5);
    assert.ok(median <= budget * (R + D), `${median} ms`);
  });
}

for (const one of ["sequential", "preserving"]) {
  for (const other of ["EIM+APDF random", "APDM+APDF sequential", "APDM+APDF preserving"]) {
    test(`${one}, who calls in the moment of the login, x ${other}: within 5 (R + D) as a rule`, () => {
      const all = Array.from({ length: 60 }, (_, seed) => {
        const world = createWorld({ seed, loss: 0.01, jitterMs: 10 });
        const bob = join(world, "bob", site(world, other));
        login(world, bob);
        world.net.run(10_000);
        const alice = join(world, "alice", site(world, `APDM+APDF ${one}`));
        login(world, alice);
        const start = world.net.now();
        alice.send("bob", "hi");
        return directAfter({ world, alice, bob, start }, 5_000);
      });
      assert.ok(quantile(all, 0.5) <= 5 * (R + D), `${quantile(all, 0.5)} ms`);
      assert.ok(quantile(all, 0.95) < Infinity, "in 5 s");
    });
  }
}

test("two symmetric ones behind one NAT that does not hairpin send little into the void", () => {
  const world = createWorld();
  const nat = world.net.nat({
    ...NATS["APDM+APDF random"]!,
    name: "carrier",
    address: "203.0.114.1",
    delayMs: DELAY_MS,
  });
  const [alice, bob] = ["alice", "bob"].map((name, i) =>
    join(world, name, {
      nat: world.net.nat({
        ...NATS["linux drop"]!,
        name: `home of ${name}`,
        address: `100.64.0.${i + 2}`,
        behind: nat,
      }),
    })
  ) as [Player, Player];
  login(world, alice, bob);
  world.net.run(3_000);
  const before = alice.process.sent + bob.process.sent;
  alice.send("bob", "hi");
  world.net.run(15_000);
  const sent = alice.process.sent + bob.process.sent - before;
  assert.equal(alice.path(), "relay");
  assert.ok(sent < 250, `${sent} datagrams`);
});

for (const other of ["EIM+APDF random", "linux accept", "APDM+APDF sequential", "APDM+APDF preserving"]) {
  test(`sequential x ${other} passes as well where packets are lost and overtake each other`, () => {
    const all = measure("APDM+APDF sequential", other, { seeds: 100, loss: 0.01, jitterMs: 10, foreignRate: 0.2 });
    const quick = all.filter((ms) => ms < 5_000).length;
    assert.ok(quick >= 95, `${quick} of 100 within 5 s`);
  });
}

test("sequential x sequential passes in at least 85 % of calls with 1 % foreign traffic", () => {
  // One port in a hundred goes to somebody else: a busy neighbour with a flow a second, against the dozens of ours.
  const all = measure("APDM+APDF sequential", "APDM+APDF sequential", { foreignRate: 1, limitMs: 8_000 });
  const passed = all.filter((ms) => ms < Infinity).length / all.length;
  assert.ok(passed >= 0.85, `${passed}`);
});

test("APDM random x EIM+APDF: half of the calls are direct within 1.2 s, 98 % within 5.8 s", () => {
  const all = measure("APDM+APDF random", "EIM+APDF random");
  const half = quantile(all, 0.5), most = quantile(all, 0.98);
  assert.ok(half <= 1_200 && most <= 5_800, `${half} ms, ${most} ms`);
});

test("a spray goes to one address, in at most 2,048 datagrams of which no two go to the same port, 200 a second", () => {
  const round = call("APDM+APDF random", "EIM+APDF random", 1);
  const { world, alice, bob } = round;
  const ports: number[] = [];
  let at = 0;
  world.net.trace = ({ fate, host, to, at: now }) => {
    if (fate !== "sent" || host !== "bob" || !to.startsWith("203.")) return;
    ports.push(Number(to.split(":")[1]));
    at = now;
  };
  world.net.block(({ from, to }) => ![from, to].some((end) => end.startsWith("192.0.2.1")));
  world.net.run(14_000);
  assert.equal(alice.path(), "relay");
  const counts = new Map<number, number>();
  for (const port of ports) counts.set(port, (counts.get(port) ?? 0) + 1);
  const sprayed = [...counts.values()].filter((count) => count === 1).length;
  assert.ok(sprayed > 1_900 && sprayed <= 2_048, `${sprayed}`);
  assert.ok(at - round.start > 11_000);
  assert.deepEqual(bob.events("message").map(({ text }) => text), ["hi"]);
});

// ---------------------------------------------------------------------------------------------------- knowing oneself

const CLASSES: [string, string, string, string][] = [
  ["public", "EIM", "unknown", "preserving"],
  ["EIM+EIF random", "unknown", "unknown", "random"],
  ["EIM+APDF preserving", "unknown", "APDF", "preserving"],
  ["EIM+APDF sequential", "unknown", "APDF", "sequential"],
  ["APDM+APDF sequential", "APDM", "APDF", "sequential"],
  ["APDM+APDF preserving", "APDM", "APDF", "preserving"],
  ["APDM+APDF random", "APDM", "APDF", "random"],
  ["linux drop", "unknown", "APDF", "preserving"],
  ["linux random", "APDM", "APDF", "random"],
  ["cgn", "unknown", "APDF", "block"],
];

function natOf(world: World, player: Player) {
  player.command({ command: "nat" });
  world.net.runUntil(() => player.events("nat").length > 0, 5_000);
  return player.events("nat")[0]!;
}

for (const [kind, mapping, filtering, allocation] of CLASSES) {
  test(`nat says of ${kind}: ${mapping}, ${filtering}, ${allocation}`, () => {
    const world = createWorld({ seed: 3 });
    const alice = join(world, "alice", site(world, kind));
    login(world, alice);
    const nat = natOf(world, alice);
    assert.deepEqual([nat.mapping, nat.filtering, nat.allocation, nat.udp], [mapping, filtering, allocation, true]);
  });
}

test("nat finds a hairpin, and finds none where there is none", () => {
  for (const hairpin of [true, false]) {
    const world = createWorld();
    const nat = world.net.nat({
      ...NATS["EIM+APDF random"]!,
      hairpin,
      name: "n",
      address: "203.0.113.4",
      delayMs: DELAY_MS,
    });
    const alice = join(world, "alice", { nat });
    login(world, alice);
    assert.equal(natOf(world, alice).hairpin, hairpin);
  }
});

// ---------------------------------------------------------------------------------------------------- the rest of it

test("NATs that forget are passed again: symmetric ones too", () => {
  for (const kind of ["APDM+APDF preserving", "APDM+APDF sequential", "APDM+APDF random"]) {
    const round = call(kind, "EIM+APDF random", 5);
    const { world, alice, bob } = round;
    assert.ok(directAfter(round, 14_000) < Infinity, kind);
    world.net.run(2_000);
    for (const { nat } of [alice, bob]) nat!.flush();
    alice.send("bob", "after");
    world.net.run(20_000);
    assert.deepEqual(bob.events("message").map(({ text }) => text), ["hi", "after"]);
    assert.equal(alice.path(), "direct", kind);
    assert.equal(bob.path(), "direct", kind);
  }
});

test("a symmetric NAT that is farther away than an opener lives is passed too, by the next spray", () => {
  for (const kind of ["APDM+APDF random", "APDM+APDF sequential"]) {
    const world = createWorld();
    let nat = world.net.nat({ ...NATS[kind]!, name: "far nat", delayMs: DELAY_MS, address: "203.0.114.1" });
    for (let i = 0; i < 9; i++) {
      nat = world.net.nat({
        ...NATS["EIM+EIF preserving"]!,
        firewall: true,
        name: `router ${i}`,
        delayMs: 0,
        behind: nat,
      });
    }
    const alice = join(world, "alice", { nat }), bob = join(world, "bob", { nat: "EIM+APDF random" });
    login(world, alice, bob);
    world.net.run(3_000);
    alice.send("bob", "hi");
    const isDirect = () => alice.path() !== "relay" && bob.path() !== "relay";
    assert.ok(world.net.runUntil(isDirect, 40_000), kind);
  }
});

test("mappings that live for 30 s idle stay open", () => {
  for (const kind of ["EIM+APDF random", "APDM+APDF sequential"]) {
    const world = createWorld();
    const place = { ...NATS[kind]!, lifetimeMs: 30_000, delayMs: DELAY_MS };
    const alice = join(world, "alice", { nat: world.net.nat({ ...place, name: "a", address: "203.0.77.2" }) });
    const bob = join(world, "bob", { nat: "EIM+APDF random" });
    login(world, alice, bob);
    alice.send("bob", "hi");
    world.net.run(250_000);
    assert.deepEqual(alice.events("path").map(({ path }) => path), ["direct"], kind);
    assert.equal(bob.events("reconnecting").length, 0);
  }
});

test("mappings that die at a certain age, whatever the traffic, are left before that", () => {
  const world = createWorld();
  const place = { ...NATS["EIM+APDF random"]!, absoluteLifetimeMs: 60_000, delayMs: DELAY_MS };
  const alice = join(world, "alice", { nat: world.net.nat({ ...place, name: "a", address: "203.0.77.2" }) });
  const bob = join(world, "bob", { nat: "EIM+APDF random" });
  login(world, alice, bob);
  const slow = [0, 0];
  for (let i = 0; i < 1_200; i++) {
    const start = world.net.now();
    bob.send("alice", `m ${i}`);
    world.net.runUntil(() => alice.events("message").length > i, 20_000);
    if (world.net.now() - start > D) slow[i < 200 ? 0 : 1]!++;
    world.net.run(500);
  }
  // Without moving in time the path would die under one message in 120, ten times in all.
  assert.ok(slow[0]! >= 1 && slow[1]! <= 2, `${slow}`);
});

test("address-dependent mapping, which one server cannot tell: passed all the same, later", () => {
  for (const kind of ["ADM+APDF random", "ADM+APDF preserving", "ADM+APDF sequential"]) {
    for (const other of ["EIM+APDF random", "linux drop"]) {
      for (const [caller, called] of [[kind, other], [other, kind]]) {
        const round = call(caller!, called!, 2);
        assert.ok(directAfter(round, 25_000) < Infinity, `${caller} calls ${called}`);
        assert.equal(round.bob.events("message")[0]!.at - round.start, R);
      }
    }
  }
});
