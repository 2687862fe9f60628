/**
 * What must not cost more the more people one knows. A measured time decides here, so each is a ratio to the same work
 * done bare in the same run, and is measured again before it fails.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { part, rogueCrowd } from "../hostile.ts";
import { createWorld, join, login, type Player } from "../scenario.ts";
import { LONG, numbered } from "../testing.ts";

/** So many rounds by turns, of which the quickest counts; and so many times all of it, before it fails. */
const ROUNDS = 20, ATTEMPTS = 5;
/** How much more it may cost to know 300 people: it would be over 20 times if they were looked through. */
const FACTOR = 3;

test("a stranger's datagram costs a client that knows 300 people what it costs one that knows nobody", LONG, () => {
  const world = createWorld({ seed: 9 });
  const alice = join(world, "alice"), bare = join(world, "zoe");
  login(world, alice, bare);
  for (const each of rogueCrowd(world, numbered(300, "m"), alice)) {
    each.open("alice", part(0, "hi"));
    world.net.run(25); // 50 a second are let through
  }
  world.net.run(3_000);
  assert.equal(new Set(alice.events("message").map(({ from }) => from)).size, 300);
  const now = world.net.now(), data = new Uint8Array(20).fill(9);
  const millisecondsOf = ({ client }: Player) => {
    const begun = performance.now();
    for (let i = 0; i < 2_000; i++) {
      client.receive({ socket: 0, from: "198.18.0.1:53", data }, now);
      client.wakeAt();
    }
    return performance.now() - begun;
  };
  const factors = [];
  while (factors.length < ATTEMPTS && !(factors.at(-1)! < FACTOR)) {
    const times = Array.from({ length: ROUNDS }, () => [millisecondsOf(alice), millisecondsOf(bare)] as const);
    factors.push(Math.min(...times.map(([known]) => known)) / Math.min(...times.map(([, nobody]) => nobody)));
  }
  console.log(`times what it costs who knows nobody: ${factors.map((factor) => factor.toFixed(2)).join(", ")}`);
  assert.ok(factors.at(-1)! < FACTOR, `${factors}`);
});
