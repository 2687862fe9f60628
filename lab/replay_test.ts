/**
 * First messages that an evil server shows again, and users who do not want to be found.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { concat, CONTROL, type Control, type ControlBody, decode, encodeClock } from "../protocol.ts";
import { encodeHandshake, encodeInner, type Endpoint, hex, hostOf, initiate, keysFrom } from "../protocol.ts";
import { evil } from "./evil.ts";
import { NO_ID } from "./hostile.ts";
import { createWorld, join, login } from "./scenario.ts";
import { LONG, many, numbered, pair, texts } from "./testing.ts";

const OPEN = { nat: "EIM+APDF random" };
const NAT = { mapping: "EIM", filtering: "APDF", allocation: "random" } as const;
type Call = Control & { type: "P2PSOMEONEWANTTOCALLYOU" };

/** More than a client remembers ephemeral keys of, or logins of people whom its user does not know. */
const STRANGERS = 4_200;
test(`whom the user knows cannot have a first message shown again after ${STRANGERS} other ones`, LONG, () => {
  const keys = keysFrom(new Uint8Array(32).fill(5)), world = createWorld({ seed: 5, server: { keys } });
  const server = evil(world, keys), bobsKeys = world.keys();
  const alice = join(world, "alice", { ...OPEN, direct: false }), carol = join(world, "carol", { direct: false });
  const bob = join(world, "bob", { keys: bobsKeys });
  login(world, alice, carol, bob);
  const calls = new Map<string, Call>();
  server.onSend = (message, to) => {
    if (message.type === "P2PSOMEONEWANTTOCALLYOU" && to === "bob" && message.body.length > 0) {
      if (!calls.has(message.peer.name)) calls.set(message.peer.name, { ...message, body: message.body.slice() });
    }
    return [message as ControlBody];
  };
  alice.send("bob", "pay 100");
  carol.send("bob", "pay 200");
  world.net.run(1_000);
  bob.command({ command: "verify", peer: "alice" }); // he knows her by her key
  bob.send("carol", "hello"); // and her because he has written to her
  world.net.run(2_000);
  const again = () => {
    for (const call of calls.values()) server.tell("bob", call);
    world.net.run(1_000);
  };
  assert.equal(calls.size, 2);
  again();
  for (let i = 0; i < STRANGERS; i++) {
    const own = world.keys(), peer = { name: `x${i}`, nonce: hex(world.bytes(8)), key: own.public, candidates: [] };
    const prologue = new TextEncoder().encode(`punch ${peer.name} ${peer.nonce} bob ${server.nonceOf("bob")}`);
    const frame = { type: "P2PMESSAGE", seq: 0, base: 0, left: 0, part: new Uint8Array(1).fill(65) } as const;
    const noise = initiate(
      { own, peer: bobsKeys.public, psk: new Uint8Array(32), prologue, ephemeral: world.keys() },
      concat(world.bytes(8), encodeClock(1), encodeInner(frame)),
    )!.message;
    const body = encodeHandshake({ type: "P2PFIRST", from: 1, probe: 0, noise });
    server.tell("bob", { type: "P2PSOMEONEWANTTOCALLYOU", peer: { ...peer, nat: NAT, punchAfterMs: 0 }, body });
    world.net.run(20); // as many as a client answers
  }
  world.net.run(1_000);
  assert.equal(texts(bob).filter((text) => text === "A").length, STRANGERS);
  for (let i = 0; i < 3; i++) again();
  assert.deepEqual([texts(bob, "alice"), texts(bob, "carol")], [["pay 100"], ["pay 200"]]);
  alice.send("bob", "pay 50");
  world.net.run(15_000);
  assert.deepEqual(texts(bob, "alice"), ["pay 100", "pay 50"]);
});

test("a clock that goes back loses nobody a message: in a login, and between two", () => {
  for (const jump of [-3_600_000, 3_600_000]) {
    const world = createWorld(), keys = world.keys(), [alice, bob] = pair(world, OPEN, { ...OPEN, keys });
    alice.send("bob", "m 0");
    world.net.run(2_000);
    alice.jump(jump);
    bob.process.stop(); // his sessions are gone: alice begins another one
    const again = join(world, "bob", { ...OPEN, keys });
    world.net.run(5_000);
    alice.send("bob", "m 1");
    world.net.run(20_000);
    again.send("alice", "m 2");
    world.net.run(20_000);
    assert.deepEqual([...texts(bob), ...texts(again), ...texts(alice)], numbered(3), `${jump}`);
  }
});

test("first messages that are lost, doubled and overtake each other: each message arrives once", LONG, () => {
  for (let seed = 0; seed < many(200, 20); seed++) {
    const world = createWorld({ seed }), [alice, bob] = pair(world, OPEN, OPEN);
    world.net.conditions = { loss: 0.2, jitterMs: 300, duplicate: 0.2 };
    for (let i = 0; i < 3; i++) {
      alice.send("bob", `m ${i}`);
      bob.send("alice", `m ${i}`);
      world.net.run(20);
    }
    world.net.run(15_000);
    assert.deepEqual([texts(alice), texts(bob)], [numbered(3), numbered(3)], `seed ${seed}`);
  }
});

// ---------------------------------------------------------------------------------------------------- not to be found

/** All text of a message that may name an endpoint. */
const endpointsIn = (message: Control): Endpoint[] => {
  if ("users" in message) return message.users.map((user) => user.public).filter((at) => at !== "");
  return "peer" in message && typeof message.peer === "object" ? message.peer.candidates : [];
};

test("nobody is told where a user of --no-direct is, nor he where others are; messages arrive, and nobody asks on", () => {
  const world = createWorld(), hidden = join(world, "hidden", { ...OPEN, direct: false, address: "192.168.7.7" });
  const open = join(world, "open", OPEN), near = join(world, "near", { nat: hidden.nat, address: "192.168.7.8" });
  const told = new Map<string, Endpoint[]>(), bare: Control[] = [];
  const introduced: Endpoint[] = []; // where others are, as the hidden one is told when they call
  let calls = 0, here = "";
  world.net.tap(({ host, to, data, from }) => {
    const message = decode(data);
    if (!message) return;
    if (host === "server") told.set(to, [...told.get(to) ?? [], ...endpointsIn(message)]);
    if (to === here && "peer" in message) introduced.push(...endpointsIn(message));
    if (message.type === "LOGIN" && message.cookie === NO_ID) bare.push(message);
    if (message.type === "P2PTRANS" && message.call % 2 === 1) calls++;
    if (host === "hidden") here = from;
  });
  login(world, hidden, open, near);
  open.command({ command: "getu", prefix: "" });
  world.net.run(2_000);
  assert.equal(open.events("users").at(-1)!.users.find(({ name }) => name === "hidden")!.public, "");
  for (let i = 0; i < 30; i++) {
    for (const player of [open, near]) player.send("hidden", `m ${i}`);
    hidden.send("open", `m ${i}`);
    hidden.send("near", `m ${i}`);
    world.net.run(20_000);
  }
  assert.deepEqual(
    [texts(open), texts(near), texts(hidden, "open"), texts(hidden, "near")],
    Array(4).fill(numbered(30)),
  );
  for (const player of [open, near, hidden]) {
    assert.deepEqual(player.events("path"), []);
    for (const { path } of player.events("message")) assert.equal(path, "relay");
  }
  const all = [...told.values()].flat();
  assert.ok(all.length > 0 && here !== "");
  assert.ok(!all.includes(here) && !all.some((endpoint) => hostOf(endpoint) === "192.168.7.7"));
  assert.deepEqual(introduced, []);
  assert.ok(calls <= 12, `${calls} calls`);
  assert.ok(bare.length >= 3);
  for (const message of bare) assert.ok(message.type === "LOGIN" && message.local.length === 0);
});

test("who comes back without --no-direct is met directly", () => {
  const world = createWorld(), [alice, bob] = pair(world, OPEN, { ...OPEN, direct: false, keepName: true });
  alice.send("bob", "m 0");
  world.net.run(3_000);
  bob.command({ command: "exit" });
  world.net.run(1_000);
  const again = join(world, "bob", OPEN);
  login(world, again);
  alice.send("bob", "m 1");
  world.net.run(5_000);
  assert.deepEqual([...texts(bob), ...texts(again)], numbered(2));
  assert.deepEqual([alice.path(), again.path()], ["direct", "direct"]);
});

test("who comes back with --no-direct while others look for him is written to over the server", () => {
  for (let seed = 0; seed < many(200, 40); seed++) {
    const world = createWorld({ seed }), keys = world.keys(), [alice, bob] = pair(world, OPEN, { ...OPEN, keys });
    alice.send("bob", "m 0");
    world.net.run(3_000);
    world.net.conditions = { loss: 0.5, jitterMs: 50 };
    bob.process.stop();
    world.net.run(1_000 + 100 * seed % 5_000); // she has lost the path, and asks the server
    const again = join(world, "bob", { ...OPEN, keys, direct: false, patient: true });
    world.net.run(30_000);
    world.net.conditions = {};
    alice.send("bob", "m 2");
    world.net.run(20_000);
    assert.equal(texts(again).at(-1), "m 2", `seed ${seed}`);
    assert.ok(again.events("message").every(({ path }) => path === "relay"));
  }
});

test("LOGIN says that in its last version: the first fields are as ever", () => {
  assert.deepEqual(Object.keys(CONTROL.LOGIN.fields).slice(0, 4), ["cookie", "key", "proof", "terms"]);
  assert.deepEqual(Object.keys(CONTROL.COOKIE.fields), ["cookie", "key", "terms"]);
});
