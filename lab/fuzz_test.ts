/**
 * A user with valid seals says valid things at random, to the server and to two honest clients who write to each other:
 * no machine throws, none does anything malformed, and the honest messages arrive, once and in order.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { ALLOCATIONS, type ControlBody, type Endpoint, FILTERINGS, formatEndpoint, hostOf } from "../protocol.ts";
import { encodeHandshake, MAPPINGS, type NatClass, type Peer } from "../protocol.ts";
import { type Dice, dice, like, NO_BYTES, NO_ID, SERVER, VICTIM } from "./hostile.ts";
import { type Fiend, fiend, SERVER6, watchAll } from "./fiend.ts";
import { createWorld, join, KINDS, login, type Player, site, type World } from "./scenario.ts";
import { LONG, many, numbered, texts } from "./testing.ts";

const SEEDS = many(200, 20), RANDOM_MS = 60_000, MESSAGES = 15;
/** A third party gets no more, from a client: nobody but a server may name one. */
const TO_STRANGERS = 20;
const SYMMETRIC: NatClass = { mapping: "APDM", filtering: "APDF", allocation: "random" };

// ---------------------------------------------------------------------------------------------------- random things

/** Numbers at their limits as often as any. */
const number = ({ below, pick, next }: Dice, bits: number) =>
  next() < 0.5 ? pick([0, 1, 2, 63, 64, 127, 128, 255, 2 ** bits - 2, 2 ** bits - 1]) % 2 ** bits : below(2 ** bits);
const some = <T>({ below }: Dice, most: number, make: () => T) => Array.from({ length: below(most + 1) }, make);

const randomNat = ({ pick, next }: Dice): NatClass =>
  next() < 0.3 ? SYMMETRIC : { mapping: pick(MAPPINGS), filtering: pick(FILTERINGS), allocation: pick(ALLOCATIONS) };

const HOSTS = [VICTIM, "192.168.1.10", "10.0.0.1", "127.0.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255"];
const randomEndpoint = (d: Dice): Endpoint => formatEndpoint(d.pick([...HOSTS, "fd00::1", "::1"]), 1 + d.below(65_535));

const randomPlan = (d: Dice): Peer => ({
  type: "P2PPLAN",
  attempt: d.next() < 0.7 ? d.below(5) : d.pick([5, 99, 100, 101, 255]),
  spray: d.next() < 0.5 ? 1 : number(d, 8),
  ports: some(d, d.pick([0, 2, 64]), () => number(d, 16)),
});

function randomFrame(d: Dice, them: { probe: number }): Peer {
  const kinds: (() => Peer)[] = [
    () => {
      const seq = d.next() < 0.7 ? d.below(200) : number(d, 32), base = d.next() < 0.7 ? d.below(200) : number(d, 32);
      return {
        type: "P2PMESSAGE",
        seq,
        base,
        left: d.pick([0, 0, 1, 65_535]),
        part: d.bytes(d.pick([0, 1, 800, 801])),
      };
    },
    () => ({
      type: "P2PMESSAGEACK",
      next: number(d, 32),
      from: number(d, 32),
      states: d.bytes(d.pick([0, 1, 32, 400])),
    }),
    () => ({ type: "P2PTRASH", probe: number(d, 32) }),
    () => ({ type: "P2PECHO", probe: d.next() < 0.8 ? them.probe : number(d, 32) }),
    () => randomPlan(d),
    () => randomPlan(d),
  ];
  return d.pick(kinds)();
}

/** Any message of the protocol, from a client or not, with fields like those that were seen, or any. */
function randomControl(d: Dice, names: string[], nonces: string[]): ControlBody {
  const name = d.next() < 0.9 ? d.pick(names) : d.pick(["", "nobody", "x".repeat(255), "two words"]);
  const kinds: (() => ControlBody)[] = [
    () => like("KEEPALIVE", { nat: randomNat(d), rttMs: number(d, 16), local: some(d, 8, () => randomEndpoint(d)) }),
    () => like("GETALLUSER", { prefix: d.pick(["", "a", "zz", name]), after: d.pick(["", name]) }),
    () => like("PUNCHED", { peer: name }),
    () => {
      const body = d.bytes(d.pick([0, 1, 30, 65, 907, 908]));
      return like("P2PTRANS", { to: name, nonce: d.pick([NO_ID, ...nonces]), call: number(d, 8), body });
    },
    () =>
      like(d.pick(["COOKIE", "WELCOME", "ALIVE", "USERS", "ERROR", "RELAYED", "INTRODUCTION", "LOGIN"] as const), {}),
  ];
  return d.pick(kinds)();
}

// ---------------------------------------------------------------------------------------------------- what he does

/** Frames go over the server, or to where the victim is said to be. */
function whisper(mallory: Fiend, victim: string, frame: Peer): void {
  const { dice: d, known } = mallory, data = mallory.sealed(victim, frame);
  const direct = (known.get(victim)?.candidates ?? []).filter((endpoint) => !endpoint.startsWith("192.168."));
  if (data.length === 0) return;
  if (direct.length > 0 && d.next() < 0.5) mallory.write(d.pick(direct), data);
  else mallory.relay(victim, data, Number(d.next() < 0.2));
}

function act(mallory: Fiend, victims: string[]): void {
  const { dice: d, known } = mallory, victim = d.pick(victims), them = known.get(victim);
  const names = [...victims, mallory.name], server = d.pick([SERVER, SERVER6]);
  const actions: [weight: number, act: () => void][] = [
    [20, () => them && whisper(mallory, victim, randomFrame(d, them))],
    [6, () => whisper(mallory, victim, { type: "P2PPLAN", attempt: d.below(5), spray: 1, ports: [] })],
    [12, () => mallory.say(randomControl(d, names, [...known.values()].map(({ nonce }) => nonce)), server)],
    [6, () => {
      const as = d.next() < 0.1 ? { nonce: d.pick([NO_ID, them?.nonce ?? NO_ID]) } : {};
      if (them) mallory.relay(victim, mallory.first(victim, randomFrame(d, them), as), Number(d.next() < 0.8));
    }],
    [5, () => mallory.relay(victim, NO_BYTES, 1)],
    [3, () => {
      const [to, from] = [number(d, 32), number(d, 32)],
        sealed = mallory.sealed(victim, { type: "P2PTRASH", probe: 1 });
      const noise = d.bytes(d.pick([0, 31, 32, 56, 72]));
      mallory.relay(victim, encodeHandshake({ type: "P2PSECOND", to, from, noise, sealed }));
    }],
    [4, () => mallory.keepalive({ nat: randomNat(d) }, server)],
    [3, () => mallory.login(server, d.next() < 0.8 ? mallory.name : d.pick([...names, "mallory-2", "mallory-3"]))],
    [1, () => {
      const site = 1 + d.below(4);
      mallory.host.move({ addresses: [`100.99.7.${site}`, `2001:db8:66::${site}`] });
      mallory.keepalive({}, server);
    }],
    [0.5, () => mallory.say(like("LOGOUT", {}))],
    [1, () => void (mallory.answers = d.next() < 0.8)],
  ];
  let at = d.next() * actions.reduce((sum, [weight]) => sum + weight, 0);
  actions.find(([weight]) => (at -= weight) < 0)![1]();
}

// ---------------------------------------------------------------------------------------------------- the honest ones

function couple(world: World, d: Dice): [Player, Player] {
  const [alice, bob] = ["alice", "bob"].map((name, i) => {
    const v6 = d.next() < 0.5 ? { v6: `2001:db8:a${i}::1` } : {};
    return join(world, name, { ...site(world, d.pick(KINDS)), ...v6 });
  });
  return [alice!, bob!];
}

/** What clients send to hosts that no server has named, and that are not theirs or the server's. */
function countStrangers(world: World, players: Player[], named: Set<string>) {
  const own = new Set(players.flatMap(({ host, nat }) => [...host.addresses, ...nat?.addresses ?? []]));
  const count = new Map<string, number>();
  world.net.tap(({ host: sender, to }) => {
    const host = hostOf(to), isKnown = own.has(host) || named.has(host) || [SERVER, SERVER6].map(hostOf).includes(host);
    if (!isKnown && players.some(({ name }) => name === sender)) count.set(host, (count.get(host) ?? 0) + 1);
  });
  return count;
}

/** How many conversations a client has: `path` tells each of them. */
const conversations = ({ client }: Player, world: World) =>
  client.command({ command: "path", peer: null }, world.net.now()).length;

function check(players: Player[], sent: number): void {
  for (const [i, player] of players.entries()) {
    const other = players[1 - i]!;
    assert.deepEqual(texts(player, other.name), numbered(sent, `${other.name} `), `what ${player.name} has heard`);
    const outcomes = player.events("sent").filter(({ to }) => to === other.name);
    assert.ok(outcomes.length === sent && outcomes.every(({ ok }) => ok), `what ${player.name} was told of his own`);
  }
}

for (let seed = 1; seed <= SEEDS; seed++) {
  test(`a user with valid seals says random valid things: seed ${seed}`, LONG, () => {
    const { watch, named, openSockets } = watchAll(), d = dice(`fuzz ${seed}`);
    const world = createWorld({ seed, v6: true, watch });
    const players = couple(world, d), [alice, bob] = players;
    login(world, ...players);
    const mallory = fiend(world, "mallory", { seed: `${seed}` }), strangers = countStrangers(world, players, named);
    const sendAt = players.map(() => Array.from({ length: MESSAGES }, () => d.below(RANDOM_MS)).sort((a, b) => a - b));
    const sent = [0, 0];
    for (let t = 0; t < RANDOM_MS;) {
      const gap = d.next() < 0.01 ? d.below(3_000) : d.below(60);
      world.net.run(gap);
      t += gap;
      for (const [i, player] of players.entries()) {
        while (sendAt[i]![sent[i]!]! <= t) player.send(players[1 - i]!.name, `${player.name} ${sent[i]!++}`);
      }
      if (mallory.isIn()) act(mallory, ["alice", "bob"]);
      else if (d.next() < 0.2) mallory.login(d.pick([SERVER, SERVER6]));
    }
    for (const [i, player] of players.entries()) {
      while (sent[i]! < MESSAGES) player.send(players[1 - i]!.name, `${player.name} ${sent[i]!++}`);
    }
    mallory.host.off();
    world.net.run(30_000);
    check(players, MESSAGES);
    for (const player of players) {
      const count = conversations(player, world), names = 1 + 3;
      assert.ok(count <= names, `${player.name} has ${count} conversations`);
    }
    for (const [host, datagrams] of strangers) {
      assert.ok(datagrams <= TO_STRANGERS, `${datagrams} datagrams to ${host}`);
    }
    world.net.run(600_000); // nobody has said anything for longer than a conversation stays warm
    for (const { name } of [alice, bob]) {
      assert.ok(openSockets(name) <= 2, `${name} keeps ${openSockets(name)} sockets`);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- the one of old

for (const attempt of [0, 1, 2]) {
  test(`the peer logs in again over IPv6 in the middle of a spray towards him, attempt ${attempt}: it ends`, () => {
    const { watch } = watchAll(), world = createWorld({ seed: 5, v6: true, watch });
    const alice = join(world, "alice", { nat: "EIM+APDF random", v6: "2001:db8:a0::1" });
    const bob = join(world, "bob", { nat: "EIM+APDF random" });
    login(world, alice, bob);
    world.net.run(5_000);
    const mallory = fiend(world, "mallory"), { host } = mallory;
    world.net.run(500);
    mallory.keepalive({ nat: SYMMETRIC });
    world.net.run(500);
    mallory.relay("alice", mallory.first("alice", { type: "P2PTRASH", probe: 1 }), 1);
    world.net.run(1_000);
    assert.ok(mallory.known.get("alice")!.session, "there is a session");
    let sprayed = 0;
    world.net.tap(({ host, to }) => void (host === "alice" && hostOf(to) === mallory.host.addresses[0] && sprayed++));
    mallory.relay("alice", mallory.sealed("alice", { type: "P2PPLAN", attempt, spray: 1, ports: [] }));
    const isSpraying = world.net.runUntil(() => sprayed > 100, 10_000);
    assert.ok(isSpraying, `only ${sprayed} datagrams: this seed shows nothing`);
    host.move({ addresses: [host.addresses[1]!] }); // there is no IPv4 any more
    mallory.login(SERVER6);
    world.net.run(500);
    assert.ok(mallory.isIn());
    mallory.relay("alice", NO_BYTES, 1);
    world.net.run(500);
    const before = sprayed;
    alice.send("bob", "alice 0");
    bob.send("alice", "bob 0");
    world.net.run(60_000);
    check([alice, bob], 1);
    assert.ok(sprayed - before <= 14, `${sprayed - before} more datagrams went to where nobody is any more`);
  });
}
