/**
 * A man in the middle answers in the server's place: at login, and in mid-session. He is faster than the server, as he
 * stands at the core. One only injects; the other one owns the path, and drops what the server and the victim say.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type Control, decode, decodeHandshake, type Endpoint, fingerprintOf, keysFrom } from "../protocol.ts";
import { createServer, type ServerOptions } from "../server.ts";
import { NO_ID, SERVER } from "./hostile.ts";
import { createWorld, join, login, type Player, type PlayerOptions, startServer, type World } from "./scenario.ts";
import { numbered, pair, texts } from "./testing.ts";

const TRUE = keysFrom(new Uint8Array(32).fill(1)), FALSE = keysFrom(new Uint8Array(32).fill(2));
const OPEN = { nat: "EIM+APDF random" }, PINNED = { fingerprint: fingerprintOf(TRUE.public) };
const passwordOf = (seed: number) => (serverKey: Uint8Array) => Uint8Array.from(serverKey, (byte) => byte ^ seed);
/** A server with the true keys that asks for the right password. */
const GUARDED = { keys: TRUE, password: passwordOf(7)(TRUE.public) };

interface Middle {
  heard: { message: Control | null; data: Uint8Array }[]; // what the victims have said to him, or to the server
  stop(): void;
}

/** He runs a server of his own for those whom he attacks. */
function middle(
  world: World,
  victims: Player[],
  { owns = false, times = 1, server = {} as Partial<ServerOptions> } = {},
): Middle {
  const random = (length: number) => world.bytes(length);
  const machine = createServer({ keys: FALSE, random, ...server }), heard: Middle["heard"] = [];
  for (const [socket, port] of [2280, 2281, 2282].entries()) machine.opened(socket, port, world.net.now());
  const names = victims.map(({ name }) => name), places = new Set<Endpoint>(); // where the victims are seen
  const perform = (effects: ReturnType<typeof machine.wake>) => {
    for (const effect of effects) {
      if (effect.kind !== "send" || effect.socket !== 0) continue;
      for (let i = 0; i < times; i++) world.net.inject({ from: SERVER, ...effect });
    }
    world.net.after(5, () => machine.wakeAt() <= world.net.now() && perform(machine.wake(world.net.now())));
  };
  const stop = world.net.tap(({ host, from, to, data }) => {
    if (names.includes(host)) places.add(from);
    if (host === "" || (!places.has(from) && !places.has(to))) return;
    if (to === SERVER) {
      heard.push({ message: decode(data), data: data.slice() });
      const copy = data.slice();
      world.net.after(0, () => perform(machine.receive({ socket: 0, from, data: copy }, world.net.now())));
    }
    if (owns && (to === SERVER || from === SERVER)) return "drop";
  });
  return { heard, stop };
}

const world = (server: Partial<ServerOptions> = { keys: TRUE }, seed = 1) => createWorld({ seed, server });
const told = (player: Player, from = 0) => player.process.events.slice(from).map(({ event }) => event.event);
const errors = (player: Player) => player.events("error").map(({ code, fatal, notice }) => ({ code, fatal, notice }));
const FATAL = (code: string) => [{ code, fatal: true, notice: undefined }];

// ---------------------------------------------------------------------------------------------------- at login

/** What he can do to somebody who logs in: by what the victim knows, the server asks for, and he has. */
const LOGINS: [
  what: string,
  victim: Partial<PlayerOptions>,
  { server?: Partial<ServerOptions>; his?: Partial<ServerOptions> },
  { injecting: string; owning: string }, // "in": at the true server; "caught": at his; or the code of the error
][] = [
  ["nothing is known", {}, {}, { injecting: "caught", owning: "caught" }],
  ["a fingerprint", PINNED, {}, { injecting: "in", owning: "server-key" }],
  ["a fingerprint, his server keeps its key", PINNED, { his: { keepsKeys: true } }, {
    injecting: "in",
    owning: "server-key",
  }],
  ["a fingerprint and the password", { ...PINNED, password: passwordOf(7) }, { server: GUARDED }, {
    injecting: "in",
    owning: "server-key",
  }],
  ["the password, he has none", { password: passwordOf(7) }, { server: GUARDED }, {
    injecting: "no-password", // of two keys neither is known: his server may say no
    owning: "no-password",
  }],
  ["the password, he has another one", { password: passwordOf(7) }, {
    server: GUARDED,
    his: { password: passwordOf(8)(FALSE.public) },
  }, { injecting: "bad-password", owning: "bad-password" }],
];
for (const [what, victim, { server = { keys: TRUE }, his = {} }, outcomes] of LOGINS) {
  for (const [way, outcome] of Object.entries(outcomes)) {
    test(`a man in the middle at login, ${way}; ${what}: ${outcome}`, () => {
      const net = world(server), began = net.net.now(), alice = join(net, "alice", { ...OPEN, ...victim });
      const { heard } = middle(net, [alice], { owns: way === "owning", server: his, times: 10 });
      net.net.run(5_000);
      if (outcome === "in" || outcome === "caught") {
        const keys = outcome === "in" ? TRUE : FALSE;
        assert.deepEqual(alice.events("login").map(({ fingerprint }) => fingerprint), [fingerprintOf(keys.public)]);
        assert.deepEqual(errors(alice), []);
        return;
      }
      assert.deepEqual(told(alice), ["error"]);
      assert.deepEqual(errors(alice), FATAL(outcome));
      assert.ok(alice.events("error")[0]!.at - began < 3_500);
      if (outcome !== "server-key") return;
      for (const { message } of heard) {
        assert.ok(message?.type === "LOGIN" && message.cookie === NO_ID && message.local.length === 0);
      }
    });
  }
}

test("who does not know the password and says WELCOME all the same is not believed, and is told of", () => {
  // He lets in whoever comes, as if he had no password but had not noticed the proof.
  const net = world(GUARDED), alice = join(net, "alice", { ...OPEN, password: passwordOf(7) });
  const stop = net.net.tap(({ host, data, from, to }) => {
    if (host === "" || to !== SERVER) return;
    const message = decode(data);
    if (message?.type !== "LOGIN" || message.cookie === NO_ID) return;
    const forged = createServer({ keys: FALSE, random: net.bytes });
    const [cookie] = forged.receive({ socket: 0, from, data: data.slice() }, net.net.now());
    if (cookie?.kind !== "send") return;
    const welcome = new Uint8Array(100);
    welcome.set(data.subarray(0, 16));
    welcome[1] = 6;
    welcome.set([...new Uint8Array(17), 4, 1, 2, 3, 4, 0, 80, ...new Uint8Array(9)], 16); // no users
    net.net.inject({ from: SERVER, to: from, data: welcome.subarray(0, 16 + 33 + 8) });
    return "drop";
  });
  net.net.run(5_000);
  assert.deepEqual(errors(alice), FATAL("bad-password"));
  assert.deepEqual(alice.events("login"), []);
  stop();
});

test("with a fingerprint, a server that answers late is waited for, whoever answers before", () => {
  const net = world(), alice = join(net, "alice", { ...OPEN, ...PINNED });
  const undo = net.net.tap(({ host, from }) => host !== "" && from === SERVER ? "drop" : undefined);
  net.net.after(1_500, undo);
  middle(net, [alice]);
  net.net.run(5_000);
  assert.deepEqual(told(alice), ["login"]);
});

test("with a fingerprint, nobody but the server can say that it speaks another version", () => {
  const net = world(), alice = join(net, "alice", { ...OPEN, ...PINNED });
  net.net.tap(({ host, data }) => {
    if (host === "" && decode(data)?.type === "COOKIE") data[16 + 8 + 32] = 2 * 9; // the byte of `terms`
  });
  middle(net, [alice]);
  net.net.run(5_000);
  assert.deepEqual(told(alice), ["login"]);
});

test("cookies with ever new keys make a client that knows a password compute few keys of it", () => {
  let computed = 0;
  const password = (key: Uint8Array) => {
    computed++;
    return passwordOf(7)(key);
  };
  const net = world(GUARDED), alice = join(net, "alice", { ...OPEN, password, patient: true });
  net.net.tap(({ host, from, to, data }) => {
    if (host === "" || to !== SERVER) return host !== "" && from === SERVER ? "drop" : undefined;
    const server = createServer({ keys: net.keys(), random: net.bytes });
    for (const effect of server.receive({ socket: 0, from, data: data.slice() }, net.net.now())) {
      if (effect.kind === "send") net.net.inject({ from: SERVER, ...effect });
    }
    return "drop";
  });
  net.net.run(60_000);
  assert.ok(computed > 0 && computed <= 35, `${computed}`);
  assert.deepEqual(alice.events("login"), []);
});

// ---------------------------------------------------------------------------------------------------- in mid-session

const KNOWN: [what: string, server: Partial<ServerOptions>, victim: Partial<PlayerOptions>, isFinal: boolean][] = [
  ["the server keeps its key", { keys: TRUE, keepsKeys: true }, {}, true],
  ["the client knows its fingerprint", { keys: TRUE }, PINNED, true],
  ["both, and a password", { ...GUARDED, keepsKeys: true }, { ...PINNED, password: passwordOf(7) }, true],
  ["neither", { keys: TRUE }, {}, false],
];
for (const [what, server, victim, isFinal] of KNOWN) {
  test(`in mid-session, ${what}: cookies with another key change nothing, however many and however fast`, () => {
    const net = world(server), [alice, bob] = pair(net, { ...OPEN, ...victim }, { ...OPEN, ...victim });
    const { heard } = middle(net, [alice, bob]), before = [alice, bob].map((player) => told(player).length);
    for (let i = 0; i < 60; i++) {
      alice.send("bob", `m ${i}`);
      net.net.run(10_000);
    }
    assert.deepEqual(texts(bob), numbered(60));
    assert.ok(heard.some(({ message }) => message?.type === "KEEPALIVE"));
    for (const [i, player] of [alice, bob].entries()) {
      const news = told(player, before[i]).filter((event) => !["sent", "message", "path"].includes(event));
      assert.deepEqual(news, []);
    }
  });

  test(`in mid-session, ${what}: who owns the path ${isFinal ? "ends the session, and no more" : "is told of"}`, () => {
    const net = world(server), [alice] = pair(net, { ...OPEN, ...victim }, { ...OPEN, ...victim });
    const began = net.net.now(), { heard } = middle(net, [alice], { owns: true });
    net.net.run(60_000);
    const found = alice.events("error");
    if (isFinal) {
      assert.deepEqual(errors(alice), FATAL("server-key"));
      assert.ok(found[0]!.at - began < 30_000);
      assert.ok(!told(alice).includes("reconnected"));
      const sent = alice.process.sent;
      alice.send("bob", "is anybody there?");
      net.net.run(60_000);
      assert.equal(alice.process.sent, sent);
      for (const { message } of heard) assert.ok(message?.type !== "LOGIN" || message.cookie === NO_ID);
    } else {
      assert.deepEqual(errors(alice), [{ code: "server-key-changed", fatal: undefined, notice: true }]);
      assert.deepEqual(told(alice).slice(-3), ["reconnecting", "error", "reconnected"]);
    }
  });
}

test("in mid-session: a cookie with the true key makes a client log in again, but at no other server", () => {
  const net = world(), [alice] = pair(net, OPEN, OPEN), before = told(alice).length;
  middle(net, [alice]);
  // Anybody knows the public key. As he has no session of hers, his server forges that cookie well enough.
  const mirror = createServer({ keys: TRUE, random: net.bytes });
  let forged = 0;
  net.net.tap(({ host, from, to, data }) => {
    if (host !== "alice" || to !== SERVER || decode(data)?.type !== "KEEPALIVE") return;
    for (const effect of mirror.receive({ socket: 0, from, data: data.slice() }, net.net.now())) {
      if (effect.kind === "send") net.net.inject({ from: SERVER, ...effect });
      forged++;
    }
  });
  net.net.conditions = { loss: 0.1 }; // now and then the answer is lost that shows the cookie to be false
  net.net.run(1_800_000);
  assert.ok(forged > 4 && told(alice, before).includes("reconnecting"));
  assert.deepEqual(errors(alice), []);
});

test("the server is started again with its key: all are back at once, and nobody is warned", () => {
  for (const [server, victim] of [[{ keys: TRUE, keepsKeys: true }, {}], [{ keys: TRUE }, PINNED]] as const) {
    const net = world(server), [alice, bob] = pair(net, { ...OPEN, ...victim }, { ...OPEN, ...victim });
    alice.send("bob", "m 0");
    net.net.run(5_000);
    net.server.stop();
    Object.assign(net, startServer(net, net.serverHost, server));
    alice.send("bob", "m 1");
    net.net.run(30_000);
    assert.deepEqual(texts(bob), numbered(2));
    for (const player of [alice, bob]) {
      assert.deepEqual(errors(player), []);
      assert.equal(player.events("reconnected").length, 1);
    }
  }
});

test("the server is started again with another key and keeps none: all are back, each is warned once, nothing is lost", () => {
  for (let seed = 0; seed < 20; seed++) {
    const net = world({ keys: TRUE }, seed), nat = "APDM+APDF random"; // on the relay
    const [alice, bob] = pair(net, { nat }, { nat });
    alice.send("bob", "m 0");
    net.net.run(5_000);
    net.server.stop();
    Object.assign(net, startServer(net, net.serverHost, { keys: keysFrom(new Uint8Array(32).fill(3)) }));
    const began = net.net.now();
    net.net.run(100 * seed);
    alice.send("bob", "m 1");
    net.net.run(30_000);
    assert.deepEqual(texts(bob), numbered(2), `seed ${seed}`);
    for (const player of [alice, bob]) {
      assert.deepEqual(errors(player), [{ code: "server-key-changed", fatal: undefined, notice: true }]);
      assert.ok(
        player.process.events.find(({ event }) => event.event === "reconnected")!.at - began < 4_000,
        `seed ${seed}`,
      ); // 2 s, and a keepalive's interval
    }
  }
});

// ---------------------------------------------------------------------------------------------------- between two users

test("two who share a secret, and whose paths he owns at both ends: they talk, and he reads and forges nothing", () => {
  const psk = new Uint8Array(32).fill(9), net = world();
  const alice = join(net, "alice", { ...OPEN, psk }), bob = join(net, "bob", { ...OPEN, psk });
  const { heard } = middle(net, [alice, bob], { owns: true });
  login(net, alice, bob);
  net.net.run(1_000);
  for (let i = 0; i < 5; i++) alice.send("bob", `m ${i}`);
  net.net.run(20_000);
  assert.deepEqual(texts(bob), numbered(5));
  const seen = heard.filter(({ message, data }) => {
    const carried = message && "body" in message ? message.body : data;
    return decodeHandshake(carried) !== null || message === null;
  });
  assert.ok(seen.length > 0);
  for (const { data } of heard) assert.ok(!new TextDecoder().decode(data).includes("m 1"));
});
