/**
 * What must not cost more the more people one knows. A measured time decides here, so each is a ratio to the same work
 * done bare in the same run, and is measured again before it fails.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { part, rogueCrowd } from "../hostile.ts";
import { createWorld, join, login } from "../scenario.ts";
import { LONG, numbered } from "../testing.ts";

test("a stranger's datagram costs a client as little as before when it knows 300 people", LONG, () => {
  const world = createWorld({ seed: 9 });
  const alice = join(world, "alice");
  login(world, alice);
  for (const each of rogueCrowd(world, numbered(300, "m"), alice)) each.open("alice", part(0, "hi"));
  world.net.run(3_000);
  const { client } = alice, now = world.net.now(), data = new Uint8Array(20).fill(9);
  const millisecondsFor = (count: number) => {
    const begun = performance.now();
    for (let i = 0; i < count; i++) {
      client.receive({ socket: 0, from: "198.18.0.1:53", data }, now);
      client.wakeAt();
    }
    return performance.now() - begun;
  };
  millisecondsFor(1_000);
  const ms = millisecondsFor(10_000);
  assert.ok(ms < 40, `${ms} ms for 10,000`);
});
