/**
 * Evil servers introduce whom they like as whom they like: with a secret, or after `verify`, they read and forge nothing,
 * and nobody is made to flood a third party.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type Control, type ControlBody, type Effect, keysFrom, publicNonce, type User } from "../protocol.ts";
import { createServer } from "../server.ts";
import { evil, rewrite } from "./evil.ts";
import { dice, like, rogueCrowd, SERVER, VICTIM, watchVictim } from "./hostile.ts";
import { createWorld, DELAY_MS, join, login, type Player, type PlayerOptions } from "./scenario.ts";
import { LONG, numbered, texts } from "./testing.ts";

const PSK = Uint8Array.from({ length: 32 }, (_, i) => i);
const verifyCode = (player: Player) => player.events("verify").at(-1)?.code;

/**
 * Alice is at a server where a puppet passes for bob, bob at one where a puppet passes for alice; what a puppet hears,
 * the other one says. Nothing in it is forged: so it stays an attack however the protocol changes.
 */
function manInTheMiddle(seed: number, options: PlayerOptions, ofPuppets: PlayerOptions = {}) {
  const keys = keysFrom(dice(`evil ${seed}`).bytes(32));
  const world = createWorld({ seed, server: { keys } });
  const control = evil(world, keys);
  const second = world.net.host({ name: "second server", addresses: ["192.0.2.2"], delayMs: DELAY_MS });
  second.run(createServer({ keys: world.keys(), random: world.bytes }) as never, { ports: [2280, 2281] });
  const elsewhere = { servers: ["192.0.2.2:2280"] };
  const trueKeys = { alice: world.keys(), bob: world.keys() };
  const falseBob = join(world, "bob", ofPuppets);
  const falseAlice = join(world, "alice", { ...ofPuppets, ...elsewhere });
  login(world, falseBob, falseAlice);
  const alice = join(world, "alice", { keys: trueKeys.alice, ...options });
  const bob = join(world, "bob", { keys: trueKeys.bob, ...options, ...elsewhere });
  login(world, alice, bob);
  const read: string[] = [];
  const run = (ms: number) => {
    for (const end = world.net.now() + ms; world.net.now() < end; world.net.run(20)) {
      for (const [puppet, other] of [[falseBob, falseAlice], [falseAlice, falseBob]] as const) {
        const to = puppet === falseBob ? "bob" : "alice";
        for (const text of texts(puppet).slice(passed[to])) {
          passed[to]++;
          read.push(text);
          other.send(to, text);
        }
      }
    }
  };
  const passed = { alice: 0, bob: 0 };
  return { world, control, alice, bob, falseAlice, falseBob, trueKeys, read, run };
}

test("an evil server swaps the keys: without a secret it reads and writes, but `verify` differs on the two sides", () => {
  const { alice, bob, falseAlice, read, run } = manInTheMiddle(1, {});
  alice.send("bob", "for bob alone");
  run(3_000);
  falseAlice.send("bob", "forged");
  run(3_000);
  assert.deepEqual(texts(bob), ["for bob alone", "forged"]);
  assert.deepEqual(read, ["for bob alone"]);
  alice.command({ command: "verify", peer: "bob" });
  bob.command({ command: "verify", peer: "alice" });
  run(1_000);
  assert.match(verifyCode(alice)!, /^\d{5}( \d{5}){7}$/);
  assert.match(verifyCode(bob)!, /^\d{5}( \d{5}){7}$/);
  assert.notEqual(verifyCode(alice), verifyCode(bob));
});

test("an evil server swaps the keys: with a secret on both sides it reads nothing, and nothing of it is taken", () => {
  for (const guess of [undefined, new Uint8Array(32).fill(7)]) {
    const { alice, bob, falseAlice, falseBob, read, run } = manInTheMiddle(2, { psk: PSK }, { psk: guess });
    alice.send("bob", "for bob alone");
    bob.send("alice", "for alice alone");
    falseAlice.send("bob", "forged");
    falseBob.send("alice", "forged");
    run(40_000);
    assert.deepEqual(read, []);
    for (const player of [alice, bob]) {
      assert.deepEqual(texts(player), []);
      assert.deepEqual(player.events("sent").map(({ ok }) => ok), [false]);
      assert.ok(player.events("error").some(({ code }) => code === "untrusted"));
    }
  }
});

test("`verify` shows the key in use: a server that lists the true keys and introduces others is found out", () => {
  const { control, alice, bob, trueKeys, read, run } = manInTheMiddle(3, {});
  let listing = false;
  control.onSend = (message) => {
    if (listing && message.type === "USERS") {
      return [rewrite(message, ({ name }) => name === "bob" ? { key: trueKeys.bob.public } : {}) as ControlBody];
    }
    return [message as ControlBody];
  };
  alice.send("bob", "first");
  run(3_000);
  assert.deepEqual(texts(bob), ["first"]);
  listing = true;
  alice.command({ command: "verify", peer: "bob" });
  run(1_000);
  listing = false;
  // Bob is told by honest means what alice's key is: what he would read aloud.
  const honest = createWorld({ seed: 33 });
  const [a, b] = [join(honest, "alice", { keys: trueKeys.alice }), join(honest, "bob", { keys: trueKeys.bob })];
  login(honest, a, b);
  b.command({ command: "verify", peer: "alice" });
  honest.net.run(1_000);
  const codesAgree = verifyCode(alice) === verifyCode(b);
  const before = read.length;
  alice.send("bob", "after the codes were compared");
  run(20_000);
  assert.ok(!(codesAgree && read.length > before), "the codes agree, and the server reads on");
});

test("`verify` shows the key in use: a server that introduces the true key under the false one's login is found out", () => {
  const { control, alice, bob, falseBob, trueKeys, read, run } = manInTheMiddle(5, {});
  let introduction: ControlBody | undefined;
  control.onSend = (message, to) => {
    if (to === "alice" && message.type === "INTRODUCTION") introduction = message as ControlBody;
    return [message as ControlBody];
  };
  alice.send("bob", "first");
  run(3_000);
  assert.deepEqual(texts(bob), ["first"]);
  control.tell("alice", rewrite(introduction as Control, () => ({ key: trueKeys.bob.public })) as ControlBody);
  run(1_000);
  alice.command({ command: "verify", peer: "bob" });
  bob.command({ command: "verify", peer: "alice" });
  run(1_000);
  const honest = createWorld({ seed: 33 });
  const [a, b] = [join(honest, "alice", { keys: trueKeys.alice }), join(honest, "bob", { keys: trueKeys.bob })];
  login(honest, a, b);
  b.command({ command: "verify", peer: "alice" });
  honest.net.run(1_000);
  if (verifyCode(alice) !== verifyCode(b)) return;
  const before = read.length, heard = texts(alice).length;
  alice.send("bob", "after the codes were compared");
  falseBob.send("alice", "forged");
  run(20_000);
  assert.deepEqual(read.slice(before), []);
  assert.deepEqual(texts(alice).slice(heard), []);
});

test("nothing is taken from another key than the one that was verified", () => {
  const { control, alice, falseBob, trueKeys, run } = manInTheMiddle(6, {});
  let listing = true;
  control.onSend = (message) =>
    listing && message.type === "USERS"
      ? [rewrite(message, ({ name }) => name === "bob" ? { key: trueKeys.bob.public } : {}) as ControlBody]
      : [message as ControlBody];
  alice.command({ command: "verify", peer: "bob" });
  run(1_000);
  listing = false;
  assert.equal(alice.events("verify").length, 1);
  falseBob.send("alice", "forged");
  run(20_000);
  assert.deepEqual(texts(alice), []);
});

test("a key that was verified before the first message is the only one that counts from then on", () => {
  const { control, alice, trueKeys, read, run } = manInTheMiddle(4, {});
  let listing = true;
  control.onSend = (message) =>
    listing && message.type === "USERS"
      ? [
        rewrite(
          message,
          ({ name }) => name === "bob" ? { key: trueKeys.bob.public, nonce: "1".repeat(16) } : {},
        ) as ControlBody,
      ]
      : [message as ControlBody];
  alice.command({ command: "verify", peer: "bob" });
  run(1_000);
  listing = false;
  assert.equal(alice.events("verify").length, 1);
  alice.send("bob", "for the verified key alone");
  run(20_000);
  assert.deepEqual(read, []);
});

test("an evil server cannot have a user talk to himself: his own message does not come back as another's", () => {
  for (const psk of [undefined, PSK]) {
    const keys = keysFrom(dice("mirror").bytes(32)), own = keysFrom(dice("mirror alice").bytes(32));
    const world = createWorld({ server: { keys } });
    const control = evil(world, keys);
    login(world, join(world, "bob", { psk }));
    control.onSend = (message, to) =>
      to !== "alice" ? [message as ControlBody] : message.type === "INTRODUCTION" ? [] : [
        rewrite(message, ({ name }) => name === "bob" ? { key: own.public, nonce: ownNonce(message) } : {}) as never,
      ];
    const ownNonce = (message: Control) =>
      message.type === "WELCOME" ? publicNonce(message.id) : control.nonceOf("alice");
    control.onHear = (message, from) => {
      if (message.type !== "P2PTRANS" || from !== "alice") return message as ControlBody;
      const nonce = control.nonceOf("alice");
      if (message.body.length > 0) control.tell("alice", like("RELAYED", { from: "bob", nonce, body: message.body }));
      return null;
    };
    const alice = join(world, "alice", { psk, keys: own });
    login(world, alice);
    world.net.run(1_000);
    alice.send("bob", "to be or not to be");
    world.net.run(20_000);
    assert.deepEqual(texts(alice), []);
  }
});

test("an evil server cannot repeat a first message to a client that was started again with the same key", () => {
  const keys = keysFrom(dice("again").bytes(32)), own = keysFrom(dice("again bob").bytes(32));
  const world = createWorld({ server: { keys } });
  const control = evil(world, keys);
  const recorded: ControlBody[] = [];
  control.onSend = (message, to) => {
    if (message.type === "P2PSOMEONEWANTTOCALLYOU" && to === "bob") recorded.push(message as ControlBody);
    return [message as ControlBody];
  };
  const options = { psk: PSK, keepName: true };
  const alice = join(world, "alice", options), bob = join(world, "bob", { ...options, keys: own });
  login(world, alice, bob);
  world.net.run(1_000);
  alice.send("bob", "pay 100");
  world.net.run(3_000);
  assert.deepEqual(texts(bob), ["pay 100"]);
  assert.ok(recorded.length > 0);
  bob.process.stop();
  const again = join(world, "bob", { ...options, keys: own, host: bob.host });
  login(world, again);
  for (const message of recorded) control.tell("bob", message);
  world.net.run(3_000);
  assert.deepEqual(texts(again), []);
});

test("an evil server repeats, reorders and doubles all that passes it: with a secret, nothing arrives twice", () => {
  const keys = keysFrom(dice("doubles").bytes(32));
  const world = createWorld({ server: { keys } });
  const control = evil(world, keys);
  const bodies: { to: string; message: ControlBody }[] = [];
  control.onSend = (message, to) => {
    if (message.type !== "RELAYED" && message.type !== "P2PSOMEONEWANTTOCALLYOU") return [message as ControlBody];
    bodies.push({ to, message: message as ControlBody });
    return [message as ControlBody, message as ControlBody];
  };
  const options = { psk: PSK, direct: false };
  const alice = join(world, "alice", options), bob = join(world, "bob", options);
  login(world, alice, bob);
  for (let i = 0; i < 20; i++) {
    alice.send("bob", `m ${i}`);
    bob.send("alice", `m ${i}`);
    world.net.run(300);
    if (i % 5 === 0) { for (const { to, message } of bodies.slice().reverse()) control.tell(to, message); }
  }
  world.net.run(5_000);
  const expected = numbered(20, "m ");
  assert.deepEqual(texts(alice), expected);
  assert.deepEqual(texts(bob), expected);
});

test("an evil server exchanges two users who share one secret: what is for bob is not shown to carol as hers", () => {
  const keys = keysFrom(dice("swap").bytes(32));
  const world = createWorld({ server: { keys } });
  const control = evil(world, keys);
  const [bob, carol] = [join(world, "bob", { psk: PSK }), join(world, "carol", { psk: PSK })];
  login(world, bob, carol);
  const listed = new Map<string, User>();
  const swap: Record<string, string> = { bob: "carol", carol: "bob" };
  control.onSend = (message, to) => {
    if (to !== "alice") return [message as ControlBody];
    if ("users" in message) { for (const user of message.users) listed.set(user.name, user); }
    return [rewrite(message, ({ name }) => {
      const other = listed.get(swap[name] ?? "");
      return other ? { key: other.key, nonce: other.nonce } : {};
    }) as ControlBody];
  };
  control.onHear = (message, from) =>
    (message.type === "P2PTRANS" && from === "alice"
      ? { ...message, to: swap[message.to] ?? message.to }
      : message) as ControlBody;
  const alice = join(world, "alice", { psk: PSK });
  login(world, alice);
  world.net.run(1_000);
  alice.send("bob", "for bob alone");
  world.net.run(20_000);
  assert.deepEqual(texts(carol), []);
});

/** Punches of one introduction to one endpoint, and endpoints in one introduction (client.ts, protocol.ts). */
const PUNCHES = 14, ENDPOINTS = 16;

test(
  "an evil server aims a client at a third party: so many datagrams at most for an introduction, and for all",
  LONG,
  () => {
    const keys = keysFrom(dice("aim").bytes(32));
    const aimed = Array.from({ length: ENDPOINTS }, (_, i) => `${VICTIM}:${1_000 + i}`);
    const results: Record<string, { introductions: number; seconds: number; datagrams: number }> = {};
    const scene = () => {
      const world = createWorld({ server: { keys, maxPerAddress: 5_000 } });
      const control = evil(world, keys);
      control.onSend = (message, to) =>
        to !== "alice" || !("peer" in message) || typeof message.peer !== "object"
          ? [message as ControlBody]
          : [rewrite(message, () => ({ candidates: aimed })) as ControlBody];
      return { world, control, hits: watchVictim(world) };
    };
    { // one introduction
      const { world, hits } = scene();
      const alice = join(world, "alice"), bob = join(world, "bob", { direct: false });
      login(world, alice, bob);
      world.net.run(500);
      alice.send("bob", "hi");
      world.net.run(1_900); // the next one is asked for 2 s after the first has failed
      results["one"] = { introductions: 1, seconds: 1.9, datagrams: hits.length };
      assert.ok(hits.length > 0 && hits.length <= PUNCHES * ENDPOINTS);
    }
    { // as many as the server likes
      const { world, control, hits } = scene();
      let introduction: ControlBody | undefined;
      const { onSend } = control;
      control.onSend = (message, to) => {
        const [instead] = onSend(message, to);
        if (to === "alice" && instead?.type === "INTRODUCTION") introduction = instead;
        return [instead!];
      };
      const alice = join(world, "alice"), bob = join(world, "bob", { direct: false });
      login(world, alice, bob);
      world.net.run(500);
      alice.send("bob", "hi");
      world.net.run(1_000);
      const before = hits.length;
      let told = 0; // the server, by alice: at each introduction that she heeds, that she punches
      world.net.trace = ({ fate, host, to }) => void (fate === "sent" && host === "alice" && to === SERVER && told++);
      for (let i = 0; i < 1_000; i++) {
        control.tell("alice", introduction!);
        world.net.run(10);
      }
      results["one peer, 100 a second"] = { introductions: 1_000, seconds: 10, datagrams: hits.length - before };
      // 20 at once and 5 a second, of which each begins the schedule again.
      assert.ok(told <= 20 + 5 * 10 + 30, `${told} datagrams to the server`);
      assert.ok(hits.length - before <= (20 + 5 * 10) * PUNCHES * ENDPOINTS / 2);
    }
    { // peers that do not exist
      const { world, hits } = scene();
      const alice = join(world, "alice");
      login(world, alice);
      const crowd = rogueCrowd(world, numbered(300, "fake-"), alice);
      hits.length = 0;
      for (const each of crowd) each.open("alice", { type: "P2PTRASH", probe: 1 });
      world.net.run(10_000);
      results["300 peers, one each"] = { introductions: 300, seconds: 10, datagrams: hits.length };
    }
    { // the peer is behind a NAT that only a spray can pass
      const { world, hits } = scene();
      const alice = join(world, "alice", { nat: "EIM+APDF random" });
      const bob = join(world, "bob", { nat: "APDM+APDF random" });
      login(world, alice, bob);
      world.net.run(5_000);
      alice.send("bob", "hi");
      world.net.run(30_000);
      results["one peer, behind a symmetric NAT"] = { introductions: 1, seconds: 30, datagrams: hits.length };
      assert.ok(hits.length <= 2 * 2_048 + 10 * PUNCHES * ENDPOINTS);
    }
    console.table(results);
    // A client is no flood: what it sends to one third party in 10 s stays under what ten sprays may send.
    assert.ok(results["300 peers, one each"]!.datagrams <= 10 * 2_048, "introductions make a flood");
  },
);

test("a network that flaps, or a server that says it does, has a client open a few sockets at a time, and close them", () => {
  const world = createWorld();
  const alice = join(world, "alice", { nat: "EIM+APDF random" });
  login(world, alice);
  world.net.run(5_000);
  let open = 0, most = 0;
  const { client } = alice;
  for (const name of ["receive", "wake", "opened", "interfaces"] as const) {
    const original = client[name] as (...args: unknown[]) => Effect[];
    (client[name] as unknown) = (...args: unknown[]) => {
      const effects = original(...args);
      for (const { kind } of effects) open += Number(kind === "open") - Number(kind === "close");
      most = Math.max(most, open);
      return effects;
    };
  }
  const [home] = alice.nat!.addresses;
  for (let i = 0; i < 60; i++) {
    alice.nat!.readdress(i % 2 ? home! : "198.18.7.7");
    alice.process.call((now) => client.interfaces([`192.168.9.${i}`], now));
    world.net.run(330);
  }
  world.net.run(60_000);
  assert.equal(open, 0);
  assert.ok(most > 0 && most < 10, `${most} at a time`);
});
