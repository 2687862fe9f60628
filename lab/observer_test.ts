/**
 * Observers are on the path, without keys: they repeat, delay and redirect what they see, and nothing comes of it.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { decode, type Endpoint, hex, hostOf, keysFrom } from "../protocol.ts";
import { dice, enter, hand, isStun, like, mayAnswer, NO_ID, observe, office, reasonOf } from "./hostile.ts";
import { sends, SERVER, typeOf, VICTIM, village, watchVictim } from "./hostile.ts";
import { createWorld, DELAY_MS, join, login } from "./scenario.ts";
import { LONG, texts } from "./testing.ts";

/** Repeats all that was seen, to where it went and to the others, from where it came and in a third party's name. */
function replayAll({ world, seen, homes }: ReturnType<typeof village>): void {
  const copies = seen.slice();
  const elsewhere = [...homes.values()];
  for (const { from, to, data } of copies) {
    for (const source of [from, `${VICTIM}:53`, ...elsewhere.slice(0, 2), SERVER]) {
      if (hostOf(source) !== hostOf(to)) world.net.inject({ from: source, to, data });
    }
    for (const target of [...elsewhere, SERVER]) {
      if (hostOf(target) !== hostOf(from)) world.net.inject({ from, to: target, data });
    }
    world.net.run(1);
  }
  world.net.run(500);
}

/** Each copy in the third party's name, alone: how much larger is the answer? STUN's apart. */
function amplification({ world, seen }: ReturnType<typeof village>) {
  const worst = { ours: 0, stun: 0 };
  let answered = 0;
  const undo = world.net.tap(({ to, bytes }) => {
    if (hostOf(to) === VICTIM) answered += bytes;
  });
  const unique = new Map(seen.map((datagram) => [`${datagram.to} ${hex(datagram.data)}`, datagram]));
  for (const { to, data } of unique.values()) {
    answered = 0;
    world.net.inject({ from: `${VICTIM}:53`, to, data });
    world.net.run(2 * DELAY_MS);
    const whose = isStun(data) ? "stun" : "ours";
    worst[whose] = Math.max(worst[whose], answered / data.length);
  }
  undo();
  return worst;
}

test("an observer repeats every datagram: nothing twice, nobody out, nothing moved, nobody amplifies", LONG, () => {
  const place = village(6);
  const { world, all, homes, talk, check, list } = place;
  // At once, by what sees it pass.
  const undo = world.net.tap(({ host, from, to, data }) => {
    if (host === "") return;
    for (const source of [from, `${VICTIM}:53`]) world.net.inject({ from: source, to, data });
  });
  const hits = watchVictim(world);
  talk();
  undo();
  check();
  const quiet = () => {
    const server = world.server, events = server.events.length, told = all.map(({ process }) => process.events.length);
    return (what: string) => {
      assert.deepEqual(server.events.slice(events).map(({ event }) => event), [], `the server, ${what}`);
      all.forEach(({ process, name }, i) =>
        assert.deepEqual(process.events.slice(told[i]!).map(({ event }) => event), [], `${name}, ${what}`)
      );
    };
  };
  // Later.
  let still = quiet();
  replayAll(place);
  const worst = amplification(place);
  still("later");
  talk();
  check();
  // After the victim has logged in again.
  const alice = join(world, "bert", { nat: "EIM+APDF random" });
  login(world, alice);
  alice.process.stop();
  world.net.run(70_000);
  login(world, join(world, "bert", { nat: "EIM+APDF random" }));
  still = quiet();
  replayAll(place);
  still("after a new login");
  // After the server's restart.
  world.restartServer();
  replayAll(place);
  world.net.run(30_000);
  still = quiet();
  replayAll(place);
  still("after the server's restart");
  talk();
  check();
  assert.deepEqual(
    new Map(list().filter(({ name }) => name !== "bert").map((user) => [user.name, user.public])),
    homes,
  );
  for (const { data } of hits) assert.ok(mayAnswer(data, data), `${typeOf(data)} to the third party`);
  const factors = `${worst.ours.toFixed(2)} times at most, STUN ${worst.stun.toFixed(2)} times`;
  console.log(`replays in a third party's name: ${hits.length} answers, amplified ${factors}`);
  assert.ok(worst.ours <= 1 && worst.stun <= 2.2);
});

test("an observer repeats the LOGIN of somebody who has left: nobody comes back by that, and the name is free", () => {
  const world = createWorld();
  const seen = observe(world);
  const erin = join(world, "erin", { nat: "EIM+APDF random" });
  login(world, erin);
  world.net.run(1_000);
  erin.command({ command: "exit" });
  world.net.run(1_000);
  for (const { from, to, data } of seen) world.net.inject({ from, to, data });
  world.net.run(1_000);
  const told = world.server.events.map(({ event }) => event.event);
  const again = join(world, "erin", { nat: "EIM+APDF random" });
  world.net.run(2_000);
  assert.deepEqual(again.events("error").map(({ code }) => code), []);
  assert.equal(again.events("login").length, 1);
  assert.deepEqual(told, ["login", "logout"]);
});

test("an observer's copies from elsewhere overtake the originals: no session traffic goes there, and nothing is lost", () => {
  const { world, all, homes, talk, check, list } = village(7);
  const hits = watchVictim(world);
  const tools = dice("race");
  let asked = 0;
  const undo = world.net.tap(({ host, from, to, data }) => {
    if (host === "" || hostOf(to) === VICTIM || tools.next() < 0.5) return;
    world.net.inject({ from: `${VICTIM}:53`, to, data });
    asked += data.length;
    const original = data.slice();
    world.net.after(60, () => world.net.inject({ from, to, data: original }));
    return "drop";
  });
  for (let i = 0; i < 5; i++) talk();
  undo();
  world.net.run(30_000);
  check();
  assert.ok(hits.length > 0);
  for (const { data } of hits) assert.ok(mayAnswer(data, data), `${typeOf(data)} to the third party`);
  assert.ok(hits.reduce((sum, { bytes }) => sum + bytes, 0) <= asked);
  assert.ok(!world.server.events.some(({ event }) => event.event === "moved" && hostOf(event.public) === VICTIM));
  assert.deepEqual(new Map(list().map((user) => [user.name, user.public])), homes);
  assert.ok(all.every((player) => player.events("reconnecting").length === 0));
});

test("an observer who passes the third party's COOKIE on to the client as well gets no more sent there than he sends", () => {
  const { world, homes, carol, dave, list } = village(8);
  const home = homes.get("carol")!;
  const hits = watchVictim(world);
  let asked = 0;
  const undo = world.net.tap(({ host, from, to, data }) => {
    if (hostOf(to) === VICTIM) return void world.net.inject({ from: SERVER, to: home, data });
    if (host === "" || from !== home || to !== SERVER) return;
    world.net.inject({ from: `${VICTIM}:53`, to, data });
    asked += data.length;
    const original = data.slice();
    world.net.after(60, () => world.net.inject({ from, to, data: original }));
    return "drop";
  });
  for (let i = 0; i < 50; i++) {
    dave.send("carol", `to carol ${i}`);
    if (i % 10 === 0) carol.send("dave", `to dave ${i}`);
    world.net.run(200);
  }
  undo();
  world.net.run(30_000);
  const bytes = hits.reduce((sum, { bytes }) => sum + bytes, 0);
  const session = hits.filter(({ data }) => typeOf(data) !== "COOKIE");
  console.log(
    `cookies passed on: ${session.length} datagrams of the session to the third party, ${bytes} B for ${asked} B`,
  );
  // Who rewrites addresses on the path is a NAT: that he can move an endpoint for as long as he goes on is the price of
  // roaming. It must end when he does, and nothing may be lost.
  assert.equal(texts(carol).filter((text) => text.startsWith("to carol")).length, 50);
  assert.equal(texts(dave).filter((text) => text.startsWith("to dave")).length, 5);
  assert.equal(list().find(({ name }) => name === "carol")!.public, home);
});

test("a LOGIN that was held back on its way does not bring back who has logged in again and left", () => {
  const { server, tools, now } = office();
  const from = "100.64.1.1:1", keys = keysFrom(tools.bytes(32)), first = hand("alice", tools, { keys, clock: 1 });
  const say = (data: Uint8Array, at: number) => server.receive({ socket: 0, from, data }, at);
  const [cookie] = sends(say(first.hello(), now));
  const heldBack = first.answer(cookie!.data)!.slice();
  const second = enter(server, hand("alice", tools, { keys, clock: 2 }), { from, now: now + 1_000 })!;
  assert.equal(reasonOf(say(heldBack, now + 2_000)), "name-taken");
  second.say(second.seal(like("LOGOUT", {})), now + 3_000);
  assert.equal(reasonOf(say(heldBack, now + 4_000)), "name-taken");
});

test("a LOGIN is not taken a second time, even if others have had the name meanwhile", () => {
  const { server, tools, come, now } = office();
  const from = "100.64.1.1:1", alice = hand("alice", tools, { keepName: true });
  const say = (data: Uint8Array, at: number) => server.receive({ socket: 0, from, data }, at);
  const [cookie] = sends(say(alice.hello(), now));
  const login = alice.answer(cookie!.data)!.slice();
  for (const { data } of sends(say(login, now))) alice.answer(data);
  say(alice.seal(like("LOGOUT", {})), now + 1_000);
  const other = come("alice", "100.64.7.7:1", now + 2_000)!;
  other.say(other.seal(like("LOGOUT", {})), now + 3_000);
  assert.equal(reasonOf(say(login, now + 4_000)), "name-taken");
  assert.ok(enter(server, hand("alice", tools), { from: "100.64.8.8:1", now: now + 5_000 })); // nobody holds it
});

test("a LOGIN that is replayed from where its client has been does not take the session back there", () => {
  for (let seed = 0; seed < 20; seed++) {
    const world = createWorld({ seed });
    const alice = join(world, "alice", { nat: "EIM+APDF random" }),
      bob = join(world, "bob", { nat: "EIM+APDF random" });
    let copy: { from: Endpoint; to: Endpoint; data: Uint8Array } | null = null;
    const untap = world.net.tap(({ from, to, data }) => {
      const message = decode(data);
      if (message?.type !== "LOGIN" || message.name !== "alice" || message.cookie === NO_ID) return;
      copy = { from, to, data: data.slice() };
    });
    login(world, alice, bob);
    untap();
    world.net.run(500);
    alice.nat!.readdress("198.18.7.7");
    world.net.run(22_000);
    world.net.inject(copy!);
    world.net.run(100 + 10 * seed);
    bob.send("alice", "are you there?");
    world.net.run(2_000);
    assert.deepEqual(texts(alice), ["are you there?"], `seed ${seed}`);
  }
});
