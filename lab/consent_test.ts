/**
 * A spray goes where a peer says that it is only while the peer goes on saying so, and the server says so too. And what
 * has been ended, because the user has blocked somebody, does nothing more.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { decode, encodeHandshake, hex, hostOf, keysFrom, type Peer } from "../protocol.ts";
import { evil } from "./evil.ts";
import { type Fiend, fiend } from "./fiend.ts";
import { dice, like, NO_BYTES, rogueCrowd, SERVER, typeOf } from "./hostile.ts";
import { createWorld, join, login, type Player, type World } from "./scenario.ts";
import { numbered, texts } from "./testing.ts";

const HIS = "100.99.7.1"; // address, as `fiend` gives it
const SYMMETRIC = { mapping: "APDM", filtering: "APDF", allocation: "random" } as const;
const PLAN: Peer = { type: "P2PPLAN", attempt: 0, spray: 1, ports: [] };
const PUNCH: Peer = { type: "P2PTRASH", probe: 1 };

/** Alice, whose NAT is an easy one, and mallory, who says that his is a hard one; `sprayed`: what she sends to him. */
function scene(
  ofAlice = "EIM+APDF random",
  ofMallory: object = SYMMETRIC,
): { world: World; alice: Player; mallory: Fiend; sent: { toHim: number; opened: number } } {
  const sent = { toHim: 0, opened: 0 };
  const world = createWorld({
    seed: 31,
    watch(machine, _now, effect) {
      if (machine !== "alice") return;
      if (effect.kind === "open") sent.opened++;
      if (effect.kind === "send" && hostOf(effect.to) === HIS) sent.toHim++;
    },
  });
  const alice = join(world, "alice", { nat: ofAlice });
  login(world, alice);
  world.net.run(5_000);
  const mallory: Fiend = fiend(world, "mallory");
  world.net.run(500);
  mallory.keepalive({ nat: ofMallory });
  world.net.run(500);
  return { world, alice, mallory, sent };
}

/** Opens a session, calls for introductions as long as is said, and repeats what is sealed as long as is said. */
function play({ world, mallory, sent }: ReturnType<typeof scene>, { introducedMs = 0, confirmsMs = 0, waitMs = 0 }) {
  mallory.relay("alice", mallory.first("alice", PUNCH), 1);
  world.net.run(1_000);
  assert.ok(mallory.known.get("alice")!.session, "there is a session");
  mallory.relay("alice", mallory.sealed("alice", PUNCH));
  if (introducedMs === 0) { // from here on alice hears nothing more of where he is
    world.net.tap(({ host, to, data }) => {
      const isWord = ["INTRODUCTION", "P2PSOMEONEWANTTOCALLYOU"].includes(typeOf(data));
      return host === "server" && hostOf(to) !== mallory.host.addresses[0] && isWord ? "drop" : undefined;
    });
  }
  for (let ms = 0; ms < waitMs; ms += 1_000) {
    if (ms % 15_000 === 0) mallory.keepalive({ nat: SYMMETRIC });
    mallory.relay("alice", mallory.sealed("alice", PUNCH));
    world.net.run(1_000);
  }
  const before = sent.toHim;
  mallory.relay("alice", mallory.sealed("alice", PLAN));
  for (let ms = 0; ms < 14_000; ms += 300) {
    if (ms < introducedMs && ms % 3_000 === 0) mallory.relay("alice", NO_BYTES, 1);
    if (ms < confirmsMs) mallory.relay("alice", mallory.sealed("alice", PLAN));
    world.net.run(300);
  }
  return sent.toHim - before;
}

test("a peer who goes on confirming is sprayed at in full", () => {
  const sprayed = play(scene(), { introducedMs: 14_000, confirmsMs: 14_000 });
  assert.ok(sprayed > 1_800 && sprayed < 2_200, `${sprayed} datagrams`);
});

test("a peer who says nothing more is sprayed at for three seconds", () => {
  const sprayed = play(scene(), { introducedMs: 14_000, confirmsMs: 0 });
  assert.ok(sprayed > 300 && sprayed < 750, `${sprayed} datagrams`);
});

test("a peer of whom the server has said nothing for 20 s is not sprayed at", () => {
  const sprayed = play(scene(), { confirmsMs: 14_000, waitMs: 25_000 });
  assert.ok(sprayed < 50, `${sprayed} datagrams`);
});

test("before a spray the server is asked again where the peer is, should its word be old", () => {
  const place = scene(), { world, mallory } = place;
  let asked = 0;
  world.net.tap(({ host, data }) => void (host === "alice" && typeOf(data) === "P2PTRANS" && asked++));
  const sprayed = play(place, { introducedMs: -1, confirmsMs: 14_000, waitMs: 25_000 }); // he does not call again
  assert.ok(mallory.isIn() && asked > 0 && sprayed > 1_500, `${sprayed} datagrams, asked ${asked} times`);
});

const EASY = { mapping: "EIM", filtering: "APDF", allocation: "random" };
for (
  const [ofAlice, ofMallory] of [["EIM+APDF random", SYMMETRIC], ["EIM+APDF random", EASY], [
    "APDM+APDF random",
    EASY,
  ]] as const
) {
  test(`a plan inside a first message is nothing (${ofAlice}, ${ofMallory.mapping}); nor do openers leave before he has shown himself`, () => {
    const { world, mallory, sent } = scene(ofAlice, ofMallory);
    mallory.answers = false; // he never shows that he is in the session
    const before = { ...sent };
    mallory.relay("alice", mallory.first("alice", { ...PLAN, attempt: 1, spray: 0, ports: [1, 2, 3, 0] }), 1);
    mallory.relay("alice", mallory.first("alice", { ...PLAN, attempt: 1 }), 1);
    world.net.run(1_000);
    if (ofAlice.startsWith("EIM")) assert.equal(sent.opened, before.opened);
    world.net.run(14_000);
    assert.ok(sent.toHim - before.toHim <= 60, `${sent.toHim - before.toHim} datagrams`);
  });
}

test("who is blocked gets nothing more, by whatever he knows: sealed datagrams, copies of his first message, calls", () => {
  const { world, alice, mallory, sent } = scene();
  const first = mallory.first("alice", { type: "P2PMESSAGE", seq: 0, base: 0, left: 0, part: new Uint8Array([65]) });
  mallory.relay("alice", first, 1);
  world.net.run(1_000);
  assert.deepEqual(texts(alice), ["A"]);
  alice.command({ command: "block", peer: "mallory" });
  world.net.run(1_000);
  const before = sent.toHim, home = alice.nat!.addresses[0]!;
  let toServer = 0;
  world.net.tap(({ host, to, data }) =>
    void (host === "alice" && to === SERVER && typeOf(data) !== "KEEPALIVE" && toServer++)
  );
  for (let i = 0; i < 20; i++) {
    for (const data of [first, mallory.sealed("alice", PUNCH), mallory.sealed("alice", PLAN)]) {
      for (const port of alice.process.ports) {
        alice.process.perform(
          alice.client.receive({ socket: 0, from: `${mallory.host.addresses[0]}:${port}`, data }, world.net.now()),
        );
      }
      mallory.relay("alice", data);
      mallory.relay("alice", data, 1);
    }
    world.net.run(200);
  }
  assert.deepEqual(texts(alice), ["A"]);
  assert.deepEqual([sent.toHim - before, toServer], [0, 0], `what ${home} sends`);
});

test("who is blocked before his key is known is known by it when he calls: no other name helps him", () => {
  const { world, alice, mallory } = scene();
  alice.command({ command: "block", peer: "nobody-yet" });
  alice.command({ command: "block", peer: "rogue" });
  const hello = () => {
    world.net.run(500);
    const message = { type: "P2PMESSAGE", seq: 0, base: 0, left: 0, part: new Uint8Array([65]) } as const;
    mallory.relay("alice", mallory.first("alice", message), 1);
    world.net.run(2_000);
  };
  for (const name of ["rogue", "somebody-else"]) {
    mallory.login(SERVER, name);
    hello();
  }
  assert.deepEqual(texts(alice), []);
  alice.command({ command: "unblock", peer: "rogue" });
  mallory.login(SERVER, "rogue");
  hello();
  assert.deepEqual(texts(alice), ["A"]);
});

test("first messages of six hundred whom an evil server lets through: keys are made for the first 200 of them alone", () => {
  const keys = keysFrom(dice("evil").bytes(32)), world = createWorld({ seed: 32, server: { keys } });
  const control = evil(world, keys), own = world.keys;
  let made = 0;
  const generateKeys = () => {
    made++;
    return own();
  };
  const alice = join(world, "alice", { nat: "EIM+APDF random", generateKeys });
  login(world, alice);
  world.net.run(5_000);
  const nat = { mapping: "EIM", filtering: "APDF", allocation: "random" } as const, tools = dice("strangers");
  for (let i = 0; i < 600; i++) {
    const them = { name: `s${i}`, nonce: hex(tools.bytes(8)), key: keysFrom(tools.bytes(32)).public };
    const peer = { ...them, candidates: ["198.51.100.1:1"], nat, punchAfterMs: 0 };
    const body = encodeHandshake({ type: "P2PFIRST", from: i, probe: 0, noise: tools.bytes(65) });
    control.tell("alice", { type: "P2PSOMEONEWANTTOCALLYOU", peer, body });
  }
  world.net.run(300);
  assert.ok(made >= 200 && made <= 220, `${made} key pairs`);
});

test("what is said while a NAT has given another endpoint arrives within half a second, by the relay", () => {
  for (let seed = 0; seed < 10; seed++) {
    const world = createWorld({ seed }), nat = "EIM+APDF random";
    const [alice, bob] = ["alice", "bob"].map((name) => join(world, name, { nat, direct: false })) as [Player, Player];
    login(world, alice, bob);
    alice.send("bob", "before");
    world.net.run(3_000 + 100 * seed);
    alice.nat!.flush();
    alice.send("bob", "after");
    world.net.run(500);
    assert.deepEqual(texts(bob), ["before", "after"], `seed ${seed}`);
  }
});

test("a client that keeps still for ten minutes is asked for no cookie again: its keepalives return the latest ones", () => {
  const world = createWorld({ v6: true }), v6 = "2001:db8:a0::1";
  const alice = join(world, "alice", { nat: "EIM+APDF random", v6 });
  login(world, alice);
  world.net.run(2_000);
  let cookies = 0, alives = 0;
  world.net.tap(({ host, data }) => {
    if (host !== "server") return;
    cookies += Number(typeOf(data) === "COOKIE");
    alives += Number(typeOf(data) === "ALIVE");
  });
  world.net.run(600_000);
  assert.ok(alives > 40, `${alives} ALIVEs`);
  assert.equal(cookies, 0);
});

test("openers leave for nobody who has not shown himself in this login, whatever he has done in another one", () => {
  const { world, mallory, sent } = scene("APDM+APDF random", EASY);
  const callFor = (ms: number, answers: boolean) => {
    const before = sent.toHim;
    mallory.answers = answers;
    mallory.relay("alice", mallory.first("alice", PUNCH), 1);
    world.net.run(1_000);
    if (answers) mallory.relay("alice", mallory.sealed("alice", PUNCH));
    world.net.run(ms);
    return sent.toHim - before;
  };
  const logInAgain = () => {
    mallory.login();
    world.net.run(500);
    mallory.keepalive({ nat: EASY });
    world.net.run(500);
  };
  assert.ok(callFor(4_000, false) <= 60, "he has not shown himself");
  world.net.run(20_000);
  logInAgain();
  const openers = callFor(4_000, true);
  assert.ok(openers >= 250, `${openers} datagrams: this shows nothing`);
  world.net.run(20_000);
  logInAgain();
  const more = callFor(4_000, false);
  assert.ok(more <= 60, `${more} datagrams to another login of his`);
});

test("twenty strangers who call twice a second keep none of ten to whom the user writes from a direct path", () => {
  const world = createWorld({ seed: 33 }), nat = "EIM+APDF random";
  const alice = join(world, "alice", { nat }), peers = numbered(10, "p").map((name) => join(world, name, { nat }));
  login(world, alice, ...peers);
  world.net.run(5_000);
  const strangers = rogueCrowd(world, numbered(20, "s"), alice); // who hear her punches, and do not echo
  for (const stranger of strangers) stranger.open("alice", PUNCH);
  const pass = (ms: number) => {
    for (let t = 0; t < ms; t += 33) { // out of step with 20 punches a second
      const each = strangers[Math.floor(t / 33) % 20]!, { nonce } = each.users.get("alice")!;
      each.say(like("P2PTRANS", { to: "alice", nonce, call: 1, body: NO_BYTES }));
      world.net.run(33);
    }
  };
  pass(10_000);
  for (const peer of peers) {
    alice.send(peer.name, "hello");
    pass(330);
  }
  pass(3_000);
  const times = peers.map(({ name }) => alice.events("path").find(({ peer }) => peer === name)?.ms ?? Infinity);
  assert.ok(times.every((ms) => ms < 1_000), `${times}`);
});

test("the first keepalive returns the cookie of WELCOME, each later one that of the ALIVE before", () => {
  const world = createWorld({}), alice = join(world, "alice"), said: string[] = [], heard: string[] = [];
  world.net.tap(({ host, data }) => {
    const message = decode(data);
    if (host === "alice" && message?.type === "KEEPALIVE") said.push(message.cookie);
    if (message?.type === "WELCOME" || message?.type === "ALIVE") heard.push(message.cookie);
  });
  login(world, alice);
  world.net.run(200_000);
  assert.ok(said.length > 8 && new Set(heard).size === said.length + 1, `${said.length} keepalives`);
  assert.deepEqual(said, heard.slice(0, said.length));
});
