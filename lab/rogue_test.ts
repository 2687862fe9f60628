/**
 * Rogues are logged in and keep none of the rules: what they can have a client hold, send and open has limits.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import type { ClientEvent } from "../client.ts";
import { type Control, decode, type Effect, type Endpoint, MAGIC, MAX_DATAGRAM_BYTES } from "../protocol.ts";
import { decodeHandshake, encodeHandshake, type Handshake, keysFrom, type Peer } from "../protocol.ts";
import { concat, formatEndpoint, hex, hostOf } from "../protocol.ts";
import { createServer } from "../server.ts";
import { dice, enter, hand, like, memory, MIB, NO_BYTES, NO_ID, observe, part, type Rogue } from "./hostile.ts";
import { rogueCrowd, sends, SERVER, typeOf, village } from "./hostile.ts";
import { createWorld, join, login, type Player, R, type World } from "./scenario.ts";
import { LONG, many, numbered } from "./testing.ts";

/** Hands a datagram to the client itself, and tells what it wants done. */
function feed({ client, process }: Player, world: World, from: Endpoint, data: Uint8Array) {
  const effects = client.receive({ socket: 0, from, data }, world.net.now());
  process.perform(effects);
  return effects;
}

/** How many sockets a client asks for from now on. */
function countSockets({ client }: Player) {
  const open = new Set<number>(), count = { opened: 0, most: 0, open };
  const watch = <E>(effects: Effect<E>[]): Effect<E>[] => {
    for (const effect of effects) {
      if (effect.kind === "close") open.delete(effect.socket);
      if (effect.kind !== "open") continue;
      open.add(effect.socket);
      count.opened++;
      count.most = Math.max(count.most, open.size);
    }
    return effects;
  };
  const { receive, wake, opened } = client;
  client.receive = (datagram, now) => watch(receive(datagram, now));
  client.wake = (now) => watch(wake(now));
  client.opened = (socket, port, now) => watch(opened(socket, port, now));
  return count;
}

/** A rogue that has a session with somebody. */
function infiltrate(world: World, victim: Player, name = "mallory"): Rogue {
  const [mallory] = rogueCrowd(world, [name], victim) as [Rogue];
  mallory.open(victim.name, { type: "P2PTRASH", probe: 1 });
  world.net.run(1_000);
  assert.ok(mallory.isOpen());
  return mallory;
}

/** The village, and a rogue that has a session with alice. */
function infiltrated(seed: number) {
  const place = village(seed);
  return { ...place, mallory: infiltrate(place.world, place.alice) };
}

const STREAMS: Record<string, (i: number) => Peer> = {
  "parts without bytes, never the last": (i) => part(i, NO_BYTES, { left: 65_535 }),
  "parts of one byte, never the last": (i) => part(i, "x", { left: 65_535 }),
  "full parts, never the last": (i) => part(i, new Uint8Array(800), { left: 65_535 }),
  "every other part": (i) => part(2 * i + 1, "x", { base: i }),
  "numbers far ahead": (i) => part(2 ** 32 - 1 - i, "x", { left: i & 0xffff }),
  "parts that were delivered before": (i) => i % 2 === 1 ? part((i + 1) / 2, "x") : part(i / 2, new Uint8Array(800)),
  "a base that jumps": (i) => part(100_000 * i % 2 ** 32, "x", { base: 100_000 * i % 2 ** 32, left: 1 }),
  "a base that jumps back": (i) => part(2 ** 31 - 100 * i, "x", { base: 2 ** 31 - 100 * i, left: 1 }),
  "a base after its part": (i) => part(i, "x", { base: i + 1 }),
  "parts that are too long": (i) => part(i, new Uint8Array(1_100), { left: 1 }),
  "wrong numbers of parts left": (i) => part(i, new Uint8Array(400), { left: (7 * i) % 5 + 1 }),
};

const FRAMES = many(20_000, 2_000);
let invaded: ReturnType<typeof village> | null = null;
for (const [i, [what, frameOf]] of Object.entries(STREAMS).entries()) {
  test(`a peer sends ${what}: no memory is held for it, and the others are not disturbed`, () => {
    const { world, alice, talk, check } = invaded ??= village(9); // each stream has a rogue of its own
    const mallory = infiltrate(world, alice, `mallory-${i}`);
    // What alice answers is left out: so many datagrams under way at one instant would be the memory that is measured.
    const hear = (frame: Peer) =>
      alice.client.receive({ socket: 0, from: mallory.at, data: mallory.sealed(frame) }, world.net.now());
    hear(part(0, "hello"));
    const before = memory();
    for (let i = 1; i <= FRAMES; i++) hear(frameOf(i));
    const grown = memory() - before;
    assert.ok(grown < 1.5 * MIB, `${(grown / MIB).toFixed(1)} MiB`);
    mallory.relay(
      mallory.sealed({ type: "P2PMESSAGEACK", next: 2 ** 32 - 1, from: 2 ** 31, states: new Uint8Array(999) }),
    );
    world.net.run(1_000);
    const { events } = alice.process;
    events.splice(
      0,
      Infinity,
      ...events.filter(({ event }) => event.event !== "message" || event.from !== mallory.name),
    );
    talk();
    check();
  });
}

test("a peer's counters: none counts twice, none from behind the window, and one far ahead harms only him", () => {
  const { world, alice, mallory, talk, check } = infiltrated(10);
  const echoes = (counter: number) => {
    const data = mallory.sealed({ type: "P2PTRASH", probe: 7 }, counter);
    return sends(feed(alice, world, mallory.at, data)).filter(({ data }) => mallory.frameOf(data)?.type === "P2PECHO")
      .length;
  };
  assert.deepEqual([5_000, 5_000, 4_999, 4_999, 5_000 - 2_048, 3_000].map(echoes), [1, 0, 1, 0, 0, 1]);
  assert.deepEqual([2 ** 48 - 1, 2 ** 48 - 1, 6_000, 2 ** 48 - 2].map(echoes), [1, 0, 0, 1]);
  talk();
  check();
});

test("an echo proves a path only if it comes from where its punch went", () => {
  const { world, alice, mallory } = infiltrated(14);
  const [one, two] = [7_001, 7_002].map((port) => formatEndpoint(hostOf(mallory.at), port)) as [Endpoint, Endpoint];
  const say = (from: Endpoint, frame: Peer) => feed(alice, world, from, mallory.sealed(frame));
  const punched = (from: Endpoint) =>
    sends(say(from, { type: "P2PTRASH", probe: 1 })).map(({ data }) => mallory.frameOf(data))
      .flatMap((frame) => frame?.type === "P2PTRASH" ? [frame.probe] : [])[0]!;
  const pathsOf = (effects: Effect<unknown>[]) =>
    effects.flatMap((effect) => effect.kind === "event" ? [effect.event as ClientEvent] : [])
      .flatMap((event) => event.event === "path" ? [event.address] : []);
  const probe = punched(one);
  punched(two);
  assert.deepEqual(pathsOf(say(two, { type: "P2PECHO", probe })), []);
  assert.deepEqual(pathsOf(say(one, { type: "P2PECHO", probe })), [one]);
});

test("a peer comes from thousands of ports of his host: a bounded number of them is remembered", LONG, () => {
  const { world, alice, mallory, talk, check } = infiltrated(11);
  const host = hostOf(mallory.at), PORTS = 5_000;
  for (let port = 10_000; port < 10_000 + PORTS; port++) {
    const from = formatEndpoint(host, port);
    const answers = sends(feed(alice, world, from, mallory.sealed({ type: "P2PTRASH", probe: port })));
    assert.ok(answers.length <= 2 && answers.every(({ to }) => to === from));
    world.net.run(5);
  }
  // Called again, and told that the peer has punched, alice tries all the ways that she has not given up.
  mallory.say(like("P2PTRANS", { to: "alice", nonce: mallory.users.get("alice")!.nonce, call: 1, body: NO_BYTES }));
  world.net.run(R);
  const tried = new Set<Endpoint>();
  world.net.trace = ({ fate, host: sender, to }) =>
    void (fate === "sent" && sender === "alice" && hostOf(to) === host && tried.add(to));
  mallory.say(like("PUNCHED", { peer: "alice" }));
  world.net.run(R);
  console.log(`a peer with ${PORTS} ports: ${tried.size} are remembered`);
  assert.ok(tried.size > 0 && tried.size <= 64, `${tried.size}`);
  world.net.run(10_000);
  talk();
  check();
});

for (const victim of ["alice", "carol"] as const) {
  test(
    `a peer tells ${victim} one plan for harder NATs after another: sockets and datagrams have a limit`,
    LONG,
    () => {
      const place = village(16), { world } = place, player = place[victim];
      const [mallory] = rogueCrowd(world, ["mallory"], player) as [Rogue];
      mallory.open(victim, { type: "P2PTRASH", probe: 1 });
      world.net.run(30_000);
      const sockets = countSockets(player);
      let sent = 0;
      world.net.trace = ({ fate, host, to }) =>
        void (fate === "sent" && host === victim && hostOf(to) === hostOf(mallory.at) && sent++);
      const ports = Array.from({ length: 64 }, (_, i) => 20_000 + i);
      for (let i = 0; i < 1_000; i++) {
        const plan: Peer = { type: "P2PPLAN", attempt: [0, 1, 2, 3, 4, 5, 100, 101, 255][i % 9]!, spray: i & 1, ports };
        feed(player, world, mallory.at, mallory.sealed(plan));
        world.net.run(10);
      }
      console.log(
        `1,000 plans in 10 s for ${victim}: ${sockets.opened} sockets, ${sockets.most} at a time, ${sent} datagrams`,
      );
      // Two rounds' sockets, and one spray and what is swept around it.
      assert.ok(
        sockets.most <= 2 * 256 && sockets.opened <= 8 * 256,
        `${sockets.opened} sockets, ${sockets.most} at once`,
      );
      assert.ok(sent <= 3 * 2_048, `${sent} datagrams`);
      world.net.run(30_000);
      place.talk();
      place.check();
    },
  );
}

test(
  "many call somebody behind a symmetric NAT at the same time: the sockets that this takes have a limit",
  LONG,
  () => {
    const { world, carol } = village(17);
    const crowd = rogueCrowd(world, numbered(40, "caller-"), carol);
    const sockets = countSockets(carol);
    for (const each of crowd) each.open("carol", { type: "P2PTRASH", probe: 1 });
    world.net.run(10_000);
    console.log(`40 callers: ${sockets.most} sockets at a time`);
    assert.ok(sockets.most > 0 && sockets.most <= 1_024, `${sockets.most} sockets at a time`);
  },
);

test("a peer begins one handshake after another: 20 are answered, and 5 a second from then on", () => {
  const { world, mallory, talk, check } = infiltrated(12);
  world.net.run(10_000);
  mallory.heard.length = 0;
  for (let i = 0; i < 90; i++) { // as many as the server passes on at once
    mallory.open("alice", { type: "P2PTRASH", probe: 1 });
    world.net.run(10);
  }
  world.net.run(1_000);
  const seconds = new Set(
    mallory.heard.map(({ data }) => decode(data)).flatMap((message) =>
      message?.type === "RELAYED" && typeOf(message.body) === "P2PSECOND" ? [hex(message.body.subarray(6, 68))] : []
    ),
  );
  assert.ok(seconds.size >= 20 && seconds.size <= 30, `${seconds.size}`);
  world.net.run(5_000);
  talk();
  check();
});

test("a user has the server pass on as many bytes as fit into a datagram, under the longest name: no exception", () => {
  const tools = dice("giant");
  const server = createServer({ keys: keysFrom(tools.bytes(32)), random: tools.bytes });
  const longest = "n".repeat(32), now = 1_000_000;
  const from = "100.64.1.1:1000";
  const giant = enter(server, hand(longest, tools), { from, now })!;
  const target = enter(server, hand("z", tools), { from: "100.64.1.2:1000", now })!;
  const local = Array.from({ length: 8 }, (_, i) => `[fd00::${i + 1}]:${60_000 + i}`);
  giant.say(giant.seal(like("KEEPALIVE", { cookie: NO_ID, local })));
  for (const call of [0, 1]) {
    for (let size = 0; size <= 1_170; size += size < 700 ? 100 : 1) {
      let question: Uint8Array;
      try {
        question = giant.seal(like("P2PTRANS", { to: "z", nonce: target.nonce, call, body: new Uint8Array(size) }));
      } catch {
        break; // does not fit into the question either
      }
      const at = now + 3_600_000 * call + 10_000 * size; // the bucket is full again
      const effects = server.receive({ socket: 0, from, data: question }, at);
      assert.ok(sends(effects).every(({ data }) => data.length <= MAX_DATAGRAM_BYTES));
    }
  }
  for (const text of ["x".repeat(255), "\u{1f600}".repeat(63)]) {
    for (
      const message of [
        like("P2PTRANS", { to: text, nonce: NO_ID, call: 1, body: NO_BYTES }),
        like("GETALLUSER", { prefix: text, after: text }),
        like("PUNCHED", { peer: text }),
      ]
    ) giant.say(giant.seal(message));
  }
});

test("sixty who call four times a second each keep nobody from writing to others, or others to him", LONG, () => {
  const bodies: Record<string, (bytes: (length: number) => Uint8Array) => Uint8Array> = {
    "a first message": (bytes) => encodeHandshake({ type: "P2PFIRST", from: 1, probe: 0, noise: bytes(65) }),
    nothing: () => NO_BYTES,
    "something sealed": (bytes) => concat(Uint8Array.of(MAGIC, 100), bytes(60)),
  };
  for (const [what, bodyOf] of Object.entries(bodies).slice(0, many(3, 1))) {
    const world = createWorld({ seed: 11 }), tools = dice(`calls ${what}`);
    const [bob, carol, dora] = ["bob", "carol", "dora"].map((name) => join(world, name, { nat: "EIM+APDF random" }));
    login(world, bob!, carol!, dora!);
    world.net.run(3_000);
    const crowd = rogueCrowd(world, numbered(60, "m"), bob!);
    let calls = 0;
    world.net.tap(({ host, data }) => {
      const message = host === "bob" ? decode(data) : null;
      if (message?.type === "P2PTRANS") calls += message.call & 1;
    });
    const flood = (ms: number) => {
      for (let t = 0, i = 0; t < ms; t += 4, i++) {
        const each = crowd[i % 60]!, { nonce } = each.users.get("bob")!;
        each.say(like("P2PTRANS", { to: "bob", nonce, call: 1, body: bodyOf(tools.bytes) }));
        world.net.run(4);
      }
    };
    flood(2_000);
    bob!.send("carol", "to carol");
    flood(5_000);
    dora!.send("bob", "to bob");
    flood(5_000);
    for (const player of [bob!, dora!]) {
      const { ok, ms } = player.events("sent")[0]!;
      assert.ok(ok && ms < 1_000, `${player.name} among calls with ${what}: ${ok}, ${ms} ms`);
      assert.equal(player.path(), "direct");
    }
    const notices = bob!.events("error").length;
    assert.ok(notices <= 20, `${notices} notices of calls with ${what}`);
    assert.ok(calls <= 2, `${calls} calls of his own, to answer those with ${what}`);
  }
});

test("copies of a first message in the name of other ports draw fewer bytes from a client than they bring", () => {
  const world = createWorld({ seed: 3 });
  const alice = join(world, "alice", { nat: "EIM+APDF random" });
  login(world, alice);
  const seen = observe(world), [mallory] = rogueCrowd(world, ["mallory"], alice) as [Rogue];
  mallory.open("alice", { type: "P2PTRASH", probe: 1 });
  world.net.run(20_000);
  const calls = seen.filter(({ from }) => from === mallory.at).map(({ data }) => decode(data));
  const call = calls.findLast((message) => message?.type === "P2PTRANS" && message.body.length > 0);
  const { noise } = decodeHandshake((call as Control & { type: "P2PTRANS" }).body) as Handshake & { type: "P2PFIRST" };
  const data = encodeHandshake({ type: "P2PFIRST", from: 0, probe: 0, noise: noise.subarray(0, 32) });
  let answers = 0, bytes = 0;
  for (let i = 0; i < 20_000; i++) {
    const from = `${hostOf(mallory.at)}:${1_024 + i}`;
    for (const answer of sends(alice.client.receive({ socket: 0, from, data }, world.net.now()))) {
      answers++;
      bytes += answer.data.length;
    }
  }
  assert.ok(answers > 0 && answers <= 300 && bytes < 20_000 * data.length / 10, `${answers} answers, ${bytes} bytes`);
});

test(
  "a peer who floods a client with punches uses up nobody else's, and one who comes and goes leaves no sockets",
  LONG,
  () => {
    const world = createWorld({ seed: 12 });
    const [alice, bob] = ["alice", "bob"].map((name) => join(world, name, { nat: "EIM+APDF random" })) as [
      Player,
      Player,
    ];
    login(world, alice, bob);
    world.net.run(5_000);
    const sockets = countSockets(bob), [mallory] = rogueCrowd(world, ["mallory"], bob) as [Rogue];
    const echoes: { at: number; to: Endpoint; probe: number }[] = [];
    let main = "";
    mallory.onFrame = (frame, from) => { // quick at bob's first socket, slow at any other
      const at = world.net.now() + (from === main ? 20 : 80);
      if (frame.type === "P2PTRASH" && from !== SERVER) echoes.push({ at, to: from, probe: frame.probe });
      return null;
    };
    const run = (ms: number) => {
      for (let t = 0; t < ms; t += 10) {
        world.net.run(10);
        for (const echo of echoes.splice(0)) {
          if (echo.at > world.net.now()) echoes.push(echo);
          else mallory.write(echo.to, mallory.sealed({ type: "P2PECHO", probe: echo.probe }));
        }
      }
    };
    const punch = (probe: number) => mallory.sealed({ type: "P2PTRASH", probe });
    mallory.open("bob", part(0, "hi"));
    run(300);
    const heard = mallory.heard.map(({ data }) => decode(data)).findLast((message) => message?.type === "INTRODUCTION");
    main = (heard as Control & { type: "INTRODUCTION" }).peer.candidates[0]!;
    run(3_000);
    for (let round = 0; round < 5; round++) {
      run(11_000);
      mallory.relay(mallory.sealed(part(round + 1, "still here")));
      // A renewal: bob takes a fresh socket. Then the first path is quicker again, and the other one is crowded out.
      mallory.relay(
        mallory.sealed({ type: "P2PPLAN", attempt: 100, spray: 0, ports: [Number(mallory.at.split(":")[1])] }),
      );
      run(3_000);
      for (let i = 0; i < 20; i++) {
        mallory.write(main, punch(i));
        run(60);
      }
      for (let port = 0; port < 40; port++) {
        feed(bob, world, `${hostOf(mallory.at)}:${5_000 + 40 * round + port}`, punch(port));
        run(10);
      }
      run(2_000);
    }
    assert.ok(
      sockets.opened >= 5 && sockets.open.size === 0,
      `${sockets.open.size} of ${sockets.opened} sockets are open`,
    );
    const punches = many(40_000, 12_000);
    for (let i = 0; i < punches; i++) {
      feed(bob, world, `${hostOf(mallory.at)}:${20_000 + i}`, punch(i));
      if (i === punches / 4) alice.send("bob", "hi");
      if (i % 10 === 0) world.net.run(1); // 10,000 a second
    }
    assert.equal(alice.path(), "direct");
    assert.ok(alice.events("path")[0]!.ms < 1_000, `${alice.events("path")[0]!.ms} ms`);
  },
);
