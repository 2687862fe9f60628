// The simulated internet, proved on machines of ten lines: everything else in lab/ stands on it.
import assert from "node:assert/strict";
import { test } from "node:test";
import type { Datagram, Effect, Endpoint, Machine } from "../protocol.ts";
import {
  type Conditions,
  createNetwork,
  linux,
  type NatOptions,
  NATS,
  type Process,
  random,
  type TraceRecord,
} from "./network.ts";

type Note = Omit<Datagram, "data"> & { text: string; at: number };

const bytes = (text: string) => new TextEncoder().encode(text);

/** Notes what it hears; `answer` says what to reply. */
function ear(answer: (note: Note) => string | null = () => null): Machine<Note> {
  return {
    opened: () => [],
    wake: () => [],
    wakeAt: () => Infinity,
    receive({ socket, from, data }, at) {
      const note = { socket, from, text: new TextDecoder().decode(data), at };
      const reply = answer(note);
      const effects: Effect<Note>[] = [{ kind: "event", event: note }];
      if (reply !== null) effects.push({ kind: "send", socket, to: from, data: bytes(reply) });
      return effects;
    },
  };
}
/** Replies with the endpoint it saw, as STUN does. */
const mirror = () => ear((note) => note.from);
const echo = () => ear((note) => note.text);

/** A machine that does nothing but wake. */
function waker(wakeAt: () => number, wake: (now: number) => Effect[] = () => []): Machine {
  return { opened: () => [], receive: () => [], wakeAt, wake };
}

function say(process: Process<Note>, to: Endpoint, options: { text?: string; socket?: number; ttl?: number } = {}) {
  const { text = "x", socket = 0, ttl = 64 } = options;
  process.perform([{ kind: "send", socket, to, data: bytes(text), ttl }]);
}

const heard = (process: Process<Note>) => process.events.map(({ event }) => event.text);
const portOf = (endpoint: string) => Number(endpoint.slice(endpoint.lastIndexOf(":") + 1));

/** A client behind a NAT, and two servers that mirror, each on two ports. All 10 ms from the core. */
function scene(options: NatOptions, conditions: Partial<Conditions> = {}) {
  const net = createNetwork({ seed: 7, ...conditions });
  const nat = net.nat({ ...options, name: "nat", address: options.firewall ? [] : "203.0.113.5", delayMs: 10 });
  const inside = options.firewall ? "203.0.113.10" : "192.168.1.10";
  const host = net.host({ name: "client", addresses: [inside], behind: nat });
  const client = host.run(ear(), { ports: [40_000] });
  const servers = ["198.51.100.1", "198.51.100.2"].map((address, i) =>
    net.host({ name: `server ${i}`, addresses: [address], delayMs: 10 }).run(mirror(), { ports: [2280, 2281, 2282] })
  );
  /** The client's public endpoint as that server sees it. */
  function seenBy(to: Endpoint, options: { process?: Process<Note>; socket?: number } = {}) {
    const { process = client, socket = 0 } = options;
    const before = process.events.length;
    say(process, to, { socket });
    net.run(100);
    return process.events[before]?.event.text ?? "nothing";
  }
  /** Does a packet from that server socket to an outside endpoint come in? */
  function comesIn(to: Endpoint, server = 0, socket = 0) {
    const before = client.events.length;
    say(servers[server]!, to, { socket, text: "hello" });
    net.run(100);
    return client.events.length > before;
  }
  return { net, nat, host, client, servers, seenBy, comesIn };
}

const A = "198.51.100.1:2280", A2 = "198.51.100.1:2281", B = "198.51.100.2:2280";

// ----------------------------------------------------------------------------------------- time and machines

test("a datagram takes exactly the sum of the links, and there is no other delay", () => {
  const net = createNetwork();
  const nat = net.nat({ ...NATS["EIM+APDF preserving"]!, name: "nat", address: "203.0.113.5", delayMs: 20 });
  const near = net.host({ name: "near", addresses: ["192.168.1.2"], behind: nat }).run(ear());
  const far = net.host({ name: "far", addresses: ["198.51.100.1"], delayMs: 13 }).run(echo(), { ports: [9] });
  const start = net.now();
  say(near, "198.51.100.1:9");
  net.run(1000);
  assert.equal(far.events[0]?.at, start + 33);
  assert.equal(near.events[0]?.at, start + 66);
  assert.deepEqual([near.sent, near.received, far.sent, far.received], [1, 1, 1, 1]);
  assert.equal(net.now(), start + 1000);
});

test("what stays below one NAT takes that NAT's lanDelayMs and is not translated", () => {
  const net = createNetwork();
  const place = { name: "nat", address: "203.0.113.5", delayMs: 20, lanDelayMs: 2 };
  const nat = net.nat({ ...NATS["APDM+APDF random"]!, ...place });
  const a = net.host({ name: "a", addresses: ["192.168.1.2"], behind: nat }).run(ear(), { ports: [5] });
  const b = net.host({ name: "b", addresses: ["192.168.1.3"], behind: nat }).run(ear(), { ports: [6] });
  const start = net.now();
  say(a, "192.168.1.3:6");
  net.run(100);
  assert.deepEqual(b.events[0]?.event, { socket: 0, from: "192.168.1.2:5", text: "x", at: start + 2 });
  assert.deepEqual(nat.mappings(), []);
});

test("loopback and the host's own addresses stay on the host, with the matching source", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.168.1.2", "2001:db8::2"], delayMs: 50 });
  const one = host.run(ear(), { ports: [5] });
  const two = host.run(ear(), { ports: [6] });
  for (const to of ["127.0.0.1:6", "192.168.1.2:6", "[::1]:6", "[2001:db8::2]:6"]) say(one, to);
  net.run(0.1);
  const sources = two.events.map(({ event }) => event.from);
  assert.deepEqual(sources, ["127.0.0.1:5", "192.168.1.2:5", "[::1]:5", "[2001:db8::2]:5"]);
});

test("events at one instant happen in the order in which they were scheduled", () => {
  const net = createNetwork();
  const start = net.now();
  const order: number[] = [];
  const next = random(3);
  const due = Array.from({ length: 500 }, (_, i) => ({ ms: Math.floor(next() * 20), i }));
  for (const { ms, i } of due) net.after(ms, () => order.push(i));
  net.after(10, () => net.after(-5, () => assert.equal(net.now() - start, 10))); // not into the past
  net.run(20);
  assert.deepEqual(order, due.sort((a, b) => a.ms - b.ms || a.i - b.i).map(({ i }) => i));
});

test("run() stops the clock exactly there, and runUntil() at the event that made it true", () => {
  const net = createNetwork();
  const start = net.now();
  let done = false;
  net.after(50, () => done = true);
  assert.equal(net.runUntil(() => done, 49), false);
  assert.equal(net.now(), start + 49);
  assert.equal(net.runUntil(() => done, 1000), true);
  assert.equal(net.now(), start + 50);
  assert.ok(start > 1e12);
});

test("wake() is called at wakeAt(), which is read again after every call", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.0.2.1"] });
  const start = net.now();
  const woken: number[] = [];
  let at = start + 1000;
  const process = host.run(waker(() => at, (now) => (woken.push(now - start), at = Infinity, [])));
  const set = (to: number) => process.call(() => (at = start + to, []));
  set(500); // nearer
  net.run(600);
  set(2000); // anew
  set(3000); // farther: the wake at 2000 is stale
  net.run(2100);
  assert.deepEqual(woken, [500]);
  net.run(10_000);
  assert.deepEqual(woken, [500, 3000]);
  set(5); // past: at once
  net.run(0);
  assert.deepEqual(woken, [500, 3000, 12_700]);
});

test("a machine that is due again after each wake is reported as spinning", () => {
  const net = createNetwork();
  let wakes = 0;
  net.host({ name: "a", addresses: ["192.0.2.1"] }).run(waker(() => net.now(), () => (wakes++, [])));
  assert.throws(() => net.run(1), /Machine spins: "a"/);
  assert.equal(wakes, 10);
});

test("a machine may need a few wakes at one instant, and may be woken again and again at one instant", () => {
  const net = createNetwork();
  let left = 9;
  const machine = waker(() => left > 0 ? net.now() : Infinity, () => (left--, []));
  const process = net.host({ name: "a", addresses: ["192.0.2.1"] }).run(machine);
  net.run(1);
  assert.equal(left, 0);
  for (let i = 0; i < 30; i++) process.call(() => (left = 1, net.after(0, () => {}), [])), net.run(0);
  assert.equal(left, 0);
});

test("wakeAt() of NaN is an error", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.0.2.1"] });
  assert.throws(() => host.run(waker(() => NaN)), /NaN/);
});

test("a virtual day of one-second ticks by two machines takes well under five seconds", () => {
  const net = createNetwork({ loss: 0.05 });
  const nat = net.nat({ ...linux("accept"), name: "nat", address: "203.0.113.5", delayMs: 20 });
  const ticker = (to: Endpoint): Machine => {
    let at = net.now() + 1000;
    const send = (now: number): Effect[] => (at = now + 1000, [{ kind: "send", socket: 0, to, data: bytes("tick") }]);
    return { opened: () => [], receive: () => [], wakeAt: () => at, wake: send };
  };
  const a = net.host({ name: "a", addresses: ["192.168.1.2"], behind: nat }).run(ticker("198.51.100.1:9"));
  const b = net.host({ name: "b", addresses: ["198.51.100.1"] }).run(ticker("203.0.113.5:9"), { ports: [9] });
  const started = performance.now();
  net.run(86_400_000);
  assert.ok(performance.now() - started < 5000, `${performance.now() - started} ms`);
  assert.deepEqual([a.sent, b.sent], [86_400, 86_400]);
  assert.ok(b.received > 81_000 && b.received < 83_000);
});

// ------------------------------------------------------------------------------------------ sockets and hosts

test("ports are bound in order, and one that is taken, or beyond maxSockets, is opened with 0", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.0.2.1", "192.0.2.2"], maxSockets: 6 });
  const opened: number[][] = [];
  const machine = { ...ear(), opened: (socket: number, port: number) => (opened.push([socket, port]), []) };
  const first = host.run(machine, { ports: [2280, 2281] });
  assert.deepEqual(opened, [[0, 2280], [1, 2281]]);
  assert.deepEqual(host.run(ear(), { ports: [2281, 2282] }).ports, [0, 2282]);
  assert.deepEqual(host.run(ear(), { ports: [{ port: 2280, address: "192.0.2.2" }] }).ports, [0]);
  const ports = [{ port: 99, address: "192.0.2.1" }, { port: 99, address: "192.0.2.2" }];
  assert.deepEqual(host.run(ear(), { ports }).ports, [99, 99]);
  const [ephemeral, beyond] = host.run(ear(), { ports: [0, 0] }).ports;
  assert.ok(ephemeral! >= 32_768 && ephemeral! <= 60_999);
  assert.equal(beyond, 0);
  first.stop();
  assert.deepEqual(host.run(ear(), { ports: [2281] }).ports, [2281]);
});

test("the open effect is answered with opened(), the close effect frees the port", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.0.2.1"] });
  const opened: number[][] = [];
  const machine = { ...ear(), opened: (socket: number, port: number) => (opened.push([socket, port]), []) };
  const process = host.run(machine, { ports: [5] });
  process.perform([{ kind: "open", socket: 7 }]);
  net.run(0);
  assert.deepEqual(opened.map(([socket]) => socket), [0, 7]);
  process.perform([{ kind: "open", socket: 7 }]);
  assert.throws(() => net.run(0), /Socket 7 of "a" is already open/);
  assert.equal(opened[1]![1], process.ports[7]);
  say(process, `192.0.2.1:${process.ports[7]}`);
  net.run(1);
  process.perform([{ kind: "close", socket: 7 }]);
  say(process, `192.0.2.1:${process.ports[7]}`, { text: "late" });
  say(process, "192.0.2.1:5", { socket: 7, text: "from a closed one" });
  net.run(1);
  assert.deepEqual(process.events.map(({ event }) => [event.socket, event.text]), [[7, "x"]]);
});

test("sockets on one address of several send from it and hear nothing else", () => {
  const net = createNetwork();
  const host = net.host({ name: "s", addresses: ["192.0.2.1", "192.0.2.2"] });
  const server = host.run(echo(), { ports: [2280, 2281].flatMap((port) => [{ port, address: "192.0.2.2" }]) });
  const client = net.host({ name: "c", addresses: ["192.0.2.9"] }).run(ear());
  say(client, "192.0.2.1:2280", { text: "main" });
  say(client, "192.0.2.2:2281", { text: "other" });
  net.run(10);
  assert.deepEqual(heard(server), ["other"]);
  assert.equal(client.events[0]?.event.from, "192.0.2.2:2281");
});

test("bytes are copied at the send, and with reuseBuffers overwritten after the receive", () => {
  const net = createNetwork({ reuseBuffers: true });
  let kept = new Uint8Array();
  const host = net.host({ name: "a", addresses: ["192.0.2.1"] });
  const keeper = { ...ear(), receive: ({ data }: Datagram) => (assert.deepEqual(data, bytes("x")), kept = data, []) };
  host.run(keeper, { ports: [5] });
  const other = host.run(ear());
  const data = bytes("x");
  other.perform([{ kind: "send", socket: 0, to: "127.0.0.1:5", data }]);
  data[0] = 0;
  net.run(1);
  assert.equal(kept.length, 1);
  assert.notDeepEqual(kept, bytes("x"));
});

test("a stopped process hears nothing, says nothing, and is not woken", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.0.2.1"] });
  let wakes = 0;
  const at = net.now() + 10;
  const machine = { ...echo(), wake: () => (wakes++, []), wakeAt: () => at };
  const dead = host.run(machine, { ports: [5] });
  const other = host.run(ear());
  say(other, "127.0.0.1:5");
  dead.perform([{ kind: "open", socket: 1 }]);
  dead.stop();
  say(dead, "127.0.0.1:6");
  dead.call(() => assert.fail("called"));
  net.run(100);
  assert.deepEqual([dead.received, dead.sent, wakes, dead.running], [0, 0, 0, false]);
  assert.equal(dead.ports.length, 1);
});

test("onEvent is told each event at its time, and may stop the process", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.0.2.1"] });
  const told: [string, number][] = [];
  const onEvent = ({ text }: Note, at: number) => (told.push([text, at]), process.stop());
  const process = host.run(echo(), { ports: [5], onEvent });
  const start = net.now();
  const other = host.run(ear());
  for (const text of ["one", "two"]) say(other, "127.0.0.1:5", { text });
  net.run(10);
  assert.deepEqual(told, [["one", start + 1 / 16]]);
  assert.deepEqual([process.sent, other.received], [0, 0]);
});

test("a host that is off is not there, and is empty when it is on again", () => {
  const net = createNetwork();
  const host = net.host({ name: "a", addresses: ["192.0.2.1"] });
  const process = host.run(echo(), { ports: [5] });
  const other = net.host({ name: "b", addresses: ["192.0.2.2"] }).run(ear());
  const fates: string[] = [];
  net.trace = ({ fate }) => fates.push(fate);
  host.off();
  assert.throws(() => host.run(ear()), /off/);
  say(other, "192.0.2.1:5");
  net.run(10);
  host.on();
  say(other, "192.0.2.1:5");
  net.run(10);
  assert.equal(process.running, false);
  assert.deepEqual(fates, ["sent", "no-route", "sent", "passed", "no-socket"]);
  const again = host.run(echo(), { ports: [5] });
  say(other, "192.0.2.1:5");
  net.run(10);
  assert.equal(again.received, 1);
});

test("a host that moves keeps its sockets, leaves from its new place, and is no longer at the old one", () => {
  const { net, nat, host, client, servers, seenBy, comesIn } = scene(NATS["EIM+EIF preserving"]!);
  const old = seenBy(A);
  assert.equal(old, "203.0.113.5:40000");
  const other = net.nat({ ...linux("drop"), name: "cafe", address: "203.0.113.77", delayMs: 3 });
  host.move({ behind: other, addresses: ["10.0.0.4"] });
  assert.equal(seenBy(A), "203.0.113.77:40000");
  assert.equal(comesIn(old), false);
  net.host({ name: "heir", addresses: ["192.168.1.10"], behind: nat }); // the old address is free
  host.move({ addresses: ["192.0.2.44"], delayMs: 5 });
  assert.equal(seenBy(A), "192.0.2.44:40000");
  say(servers[0]!, "192.0.2.44:40000", { text: "in flight" });
  net.after(12, () => host.move({ addresses: ["192.0.2.45"], delayMs: 5 }));
  net.run(100);
  assert.equal(heard(client).includes("in flight"), false);
  const sent = servers[0]!.received;
  host.move({ addresses: [] });
  assert.equal(seenBy(A), "nothing");
  assert.equal(servers[0]!.received, sent);
  assert.equal(client.running, true);
});

test("an address can exist once in a realm, and in many realms", () => {
  const net = createNetwork();
  const nat = (name: string, address: string) => net.nat({ ...linux("drop"), name, address });
  const [one, two] = [nat("one", "203.0.113.1"), nat("two", "203.0.113.2")];
  for (const behind of [one, two]) net.host({ name: behind.name, addresses: ["192.168.1.2"], behind });
  const twice: [() => unknown, RegExp][] = [
    [() => nat("three", "203.0.113.2"), /"203.0.113.2" exists twice below "core"/],
    [() => net.host({ name: "x", addresses: ["192.168.1.2"], behind: one }), /twice below "one"/],
    [() => net.nat({ ...linux("drop"), name: "four" }), /needs an address/],
  ];
  for (const [action, message] of twice) assert.throws(action, message);
});

// --------------------------------------------------------------------------------------- mapping and filtering

for (const [name, options] of Object.entries(NATS)) {
  test(`NATS["${name}"] maps, filters and allocates as it says`, () => {
    const { seenBy, comesIn, nat } = scene(options);
    const first = seenBy(A);
    // Nothing else was sent yet: from A the reply came in, from elsewhere what the filter admits.
    const { filtering, mapping } = options;
    const admitted = [comesIn(first, 0, 0), comesIn(first, 0, 1), comesIn(first, 1, 0)];
    assert.deepEqual(admitted, [true, filtering !== "APDF", filtering === "EIF"]);
    // The port that was probed above from A:2281 may be spoilt on a Linux with INPUT accept: use A:2282.
    const ports = [first, seenBy("198.51.100.1:2282"), seenBy(B), seenBy(A)].map(portOf);
    const same = [ports[1] === ports[0], ports[2] === ports[0] || options.linux === "accept", ports[3] === ports[0]];
    assert.deepEqual(same, [mapping !== "APDM", mapping === "EIM", true]);
    if (options.allocation === "preserving") assert.equal(ports[0], 40_000);
    else assert.notEqual(ports[0], 40_000);
    if (options.allocation === "sequential" && mapping === "APDM") assert.deepEqual(ports[2], ports[0]! + 2);
    if (typeof options.allocation === "object") assert.equal(new Set(nat.mappings().map(blockOf(options))).size, 1);
  });
}

const blockOf = ({ allocation }: NatOptions) => ({ outer }: { outer: Endpoint }) =>
  Math.floor((portOf(outer) - 1024) / (allocation as { block: number }).block);

test("two NATs open a path once both have sent, whatever their filters", () => {
  for (const filtering of ["EIF", "ADF", "APDF"]) {
    const { net, client, seenBy } = scene(NATS[`EIM+${filtering} random`]!);
    const other = net.nat({ ...NATS["EIM+APDF sequential"]!, name: "other", address: "203.0.113.6", delayMs: 10 });
    const peer = net.host({ name: "peer", addresses: ["10.0.0.2"], behind: other }).run(ear());
    const [mine, theirs] = [seenBy(A), seenBy(A, { process: peer })];
    client.events.length = peer.events.length = 0;
    say(client, theirs, { text: "one" }); // dies at the filter there
    net.run(100);
    assert.deepEqual(heard(peer), []);
    say(peer, mine, { text: "two" });
    net.run(100);
    assert.deepEqual(heard(client), ["two"]);
    say(client, theirs, { text: "three" });
    net.run(100);
    assert.deepEqual(heard(peer), ["three"]);
  }
});

test("packets to a port that nobody mapped, and from a LAN to a foreign LAN address, go nowhere", () => {
  const { net, client, comesIn, nat } = scene(NATS["EIM+EIF random"]!);
  const fates: string[] = [];
  net.trace = ({ node, fate }) => fates.push(`${node} ${fate}`);
  assert.equal(comesIn("203.0.113.5:40000"), false);
  assert.equal(fates.at(-1), "nat unmapped");
  say(client, "192.168.1.99:5");
  net.run(100);
  assert.equal(fates.at(-1), "core no-route");
  assert.equal(nat.mappings().length, 1);
});

test("a preserving NAT gives a port to one mapping: the first destination keeps it, the next ones do not", () => {
  const { net, client, seenBy } = scene(NATS["APDM+APDF preserving"]!);
  assert.equal(portOf(seenBy(A)), 40_000);
  assert.notEqual(portOf(seenBy(B)), 40_000);
  client.perform([{ kind: "open", socket: 1 }]);
  net.run(0);
  assert.equal(portOf(seenBy(B, { socket: 1 })), client.ports[1]);
});

test("a preserving NAT does not preserve what is outside its range", () => {
  const { nat, net, seenBy } = scene({ ...NATS["EIM+APDF preserving"]!, portRange: [10_000, 20_000] });
  for (const port of [9_999, 20_001]) {
    const host = net.host({ name: `${port}`, addresses: [`10.0.0.${port % 10}`], behind: nat });
    const seen = portOf(seenBy(A, { process: host.run(ear(), { ports: [port] }) }));
    assert.ok(seen >= 10_000 && seen <= 20_000);
  }
});

test("two hosts that use one port get two from a preserving NAT", () => {
  const { net, nat, seenBy } = scene(NATS["EIM+APDF preserving"]!);
  const rival = net.host({ name: "rival", addresses: ["192.168.1.11"], behind: nat }).run(ear(), { ports: [40_000] });
  assert.equal(portOf(seenBy(A)), 40_000);
  assert.notEqual(portOf(seenBy(B, { process: rival })), 40_000);
});

// ------------------------------------------------------------------------------------------------- allocation

/** The outside ports of so many fresh flows. */
function ports(options: Partial<NatOptions>, count: number, gapMs = 0) {
  const { net, client, seenBy } = scene({ ...NATS["APDM+APDF sequential"]!, ...options });
  return Array.from({ length: count }, (_, i) => {
    client.perform([{ kind: "open", socket: i + 1 }]);
    net.run(gapMs);
    return portOf(seenBy(A, { socket: i + 1 }));
  });
}

test("sequential allocation steps by `step`, wraps in the range and passes over taken ports", () => {
  for (const step of [1, 2, -1, -2]) {
    const seen = ports({ step }, 5);
    assert.deepEqual(seen, seen.map((_, i) => seen[0]! + i * step));
  }
  const wrapped = ports({ portRange: [5000, 5004] }, 5);
  assert.deepEqual([...wrapped].sort(), [5000, 5001, 5002, 5003, 5004]);
  const from = wrapped.indexOf(5004);
  if (from < 4) assert.equal(wrapped[from + 1], 5000);
  const taken = scene({ ...NATS["APDM+APDF sequential"]!, portRange: [5000, 5009] });
  const first = portOf(taken.seenBy(A));
  for (let i = 0; i < 9; i++) taken.seenBy(`198.51.100.2:${3000 + i}`); // the other nine
  taken.net.run(60_000);
  taken.seenBy(A); // the first alone survives the two minutes
  taken.net.run(90_000);
  assert.notEqual(portOf(taken.seenBy(A2)), first);
});

test("foreign flows move a sequential counter, by their rate", () => {
  const seen = ports({ foreignRate: 10 }, 100, 900); // 1 s between flows: our own and ten foreign ones
  const total = seen.slice(1).reduce((sum, port, i) => sum + ((port - seen[i]! + 64_512) % 64_512), 0);
  assert.ok(total > 99 * 9 && total < 99 * 13, `${total}`);
});

test("random allocation spreads over the range without collision", () => {
  const seen = ports({ allocation: "random", portRange: [10_000, 10_399] }, 400);
  assert.equal(new Set(seen).size, 400);
  assert.ok(Math.min(...seen) >= 10_000 && Math.max(...seen) <= 10_399);
  assert.notDeepEqual(seen, [...seen].sort());
  const wide = ports({ allocation: "random" }, 200).sort((a, b) => a - b);
  assert.ok(wide[20]! < 20_000 && wide[100]! > 20_000 && wide[100]! < 46_000 && wide[180]! > 46_000);
});

test("each subscriber has a block of its own, and those without one get nothing", () => {
  for (const options of [{ allocation: { block: 100 } }, { subscriberBlock: 100 }]) {
    const kind: NatOptions = { ...NATS["APDM+APDF sequential"]!, ...options, portRange: [20_000, 20_250] };
    const { net, nat, seenBy } = scene(kind);
    const blocks = [10, 11, 12].map((last) => {
      const address = `192.168.1.${last + 10}`;
      const process = net.host({ name: address, addresses: [address], behind: nat }).run(ear());
      return [1, 2, 3].map((i) => seenBy(`198.51.100.1:${2279 + i}`, { process })).map((endpoint) =>
        endpoint === "nothing" ? -1 : Math.floor((portOf(endpoint) - 20_000) / 100)
      );
    });
    assert.deepEqual(blocks.map((ports) => new Set(ports).size), [1, 1, 1]);
    assert.deepEqual(blocks.map(([block]) => block!).sort(), [-1, 0, 1]); // two blocks fit
  }
});

test("several public addresses are paired with inside addresses, or drawn for each mapping", () => {
  const hosts = (pooling: "paired" | "arbitrary") => {
    const net = createNetwork({ seed: 3 });
    const address = ["203.0.113.5", "203.0.113.6"];
    const nat = net.nat({ ...NATS["APDM+APDF random"]!, name: "nat", address, pooling });
    net.host({ name: "s", addresses: ["192.0.2.1"] }).run(ear(), { ports: [9] });
    return Array.from({ length: 20 }, (_, i) => {
      const process = net.host({ name: `${i}`, addresses: [`10.0.0.${i + 1}`], behind: nat }).run(ear());
      for (let port = 1; port < 20; port++) say(process, `192.0.2.1:${port}`);
      const mine = nat.mappings().filter(({ inner }) => inner?.startsWith(`10.0.0.${i + 1}:`));
      return new Set(mine.map(({ outer }) => outer.split(":")[0])).size;
    });
  };
  assert.deepEqual(new Set(hosts("paired")), new Set([1]));
  assert.deepEqual(new Set(hosts("arbitrary")), new Set([2]));
});

test("a full table and a used-up quota refuse new mappings until old ones expire", () => {
  for (const limit of [{ maxMappings: 2 }, { quota: 2 }]) {
    const { net, nat, seenBy } = scene({ ...NATS["APDM+APDF random"]!, ...limit });
    assert.notEqual(seenBy(A), "nothing");
    assert.notEqual(seenBy(A2), "nothing");
    assert.equal(seenBy(B), "nothing");
    const other = net.host({ name: "other", addresses: ["192.168.1.11"], behind: nat }).run(ear());
    assert.equal(seenBy(B, { process: other }) !== "nothing", "quota" in limit);
    net.run(120_000);
    assert.notEqual(seenBy(B), "nothing");
  }
});

// ------------------------------------------------------------------------------------------ lifetime and flush

test("a mapping lives for lifetimeMs after the last packet, and gets a new port after that", () => {
  const { net, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, lifetimeMs: 60_000 });
  const first = seenBy(A); // passes the NAT now, its reply 40 ms later; 100 ms are over when this returns
  net.run(59_900);
  assert.equal(seenBy(A), first);
  net.run(60_000);
  assert.equal(comesIn(first), false);
  assert.notEqual(seenBy(A), first);
});

test("inbound packets keep a mapping alive, unless inboundRefresh is false", () => {
  for (const inboundRefresh of [true, false]) {
    const { net, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, lifetimeMs: 60_000, inboundRefresh });
    const first = seenBy(A);
    for (let i = 0; i < 2; i++) net.run(40_000), comesIn(first);
    assert.equal(comesIn(first), inboundRefresh);
  }
});

test("a permission expires by itself, while another keeps the mapping alive", () => {
  const { net, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, lifetimeMs: 60_000 });
  const first = seenBy(A);
  for (let i = 0; i < 3; i++) net.run(30_000), assert.equal(seenBy(B), first);
  assert.equal(comesIn(first, 0), false);
  assert.equal(comesIn(first, 1), true);
});

test("a permission that expired begins anew as an unreplied one", () => {
  const { net, client, servers, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, unrepliedMs: 30_000 });
  const first = seenBy(A);
  for (let i = 0; i < 5; i++) net.run(25_000), seenBy(B);
  servers[0]!.stop();
  say(client, A);
  net.run(30_000);
  net.inject({ from: A, to: first, data: bytes("late") });
  net.run(100);
  assert.equal(heard(client).includes("late"), false);
  assert.equal(comesIn(first, 1), true);
});

test("a flow that was never answered dies after unrepliedMs, an answered one after lifetimeMs", () => {
  const { net, client, seenBy, nat } = scene(linux("drop"));
  say(client, "198.51.100.1:9"); // no socket there
  net.run(29_999);
  assert.equal(nat.mappings().length, 1);
  net.run(1);
  assert.equal(nat.mappings().length, 0);
  seenBy(A);
  net.run(119_000);
  assert.equal(nat.mappings().length, 1);
  net.run(1000);
  assert.equal(nat.mappings().length, 0);
});

test("with an absolute lifetime a mapping dies at that age, whatever the traffic", () => {
  const { net, seenBy } = scene({ ...NATS["EIM+APDF random"]!, absoluteLifetimeMs: 60_000 });
  const seen = Array.from({ length: 13 }, () => (net.run(4_900), seenBy(A)));
  assert.equal(new Set(seen.slice(0, 12)).size, 1);
  assert.notEqual(seen[12], seen[0]);
});

test("flush() forgets everything: nothing comes in, and the next packet gets another port", () => {
  for (const allocation of ["sequential", "random", { block: 128 }] as const) {
    const { nat, seenBy, comesIn } = scene({ ...NATS["EIM+EIF random"]!, allocation });
    const first = seenBy(A);
    nat.flush();
    assert.deepEqual(nat.mappings(), []);
    assert.equal(comesIn(first), false);
    const next = seenBy(A);
    if (allocation === "sequential") assert.equal(portOf(next), portOf(first) + 1);
    else assert.notEqual(next, first);
    if (typeof allocation === "object") {
      const [before, after] = [first, next].map((outer) => blockOf(nat.options)({ outer }));
      assert.notEqual(before, after);
    }
  }
});

test("readdress() gives the NAT another public address, and the old one leads nowhere", () => {
  const { nat, seenBy, comesIn } = scene(NATS["EIM+EIF preserving"]!);
  const first = seenBy(A);
  nat.readdress("203.0.113.99");
  assert.equal(comesIn(first), false);
  assert.equal(comesIn("203.0.113.99:40000"), false);
  assert.equal(seenBy(A), "203.0.113.99:40000");
  assert.equal(comesIn("203.0.113.99:40000"), true);
});

// ------------------------------------------------------------------------------------- hairpin and carrier NAT

test("hairpin: a packet to the own NAT's public endpoint turns round there with the outside source, or is dropped", () => {
  for (const hairpin of [false, true, "external", "internal"] as const) {
    const { net, nat, seenBy } = scene({ ...NATS["EIM+EIF random"]!, hairpin });
    const peer = net.host({ name: "peer", addresses: ["192.168.1.11"], behind: nat }).run(ear(), { ports: [5] });
    const theirs = seenBy(A, { process: peer });
    const mine = seenBy(A);
    const sender = net.host({ name: "sender", addresses: ["192.168.1.12"], behind: nat }).run(ear(), { ports: [6] });
    const before = seenBy(A, { process: sender });
    const start = net.now();
    say(sender, theirs, { text: "round" });
    net.run(100);
    const note = peer.events.find(({ event }) => event.text === "round")?.event;
    assert.equal(note?.from, hairpin === false ? undefined : hairpin === "internal" ? "192.168.1.12:6" : before);
    if (note) assert.equal(note.at - start, 1);
    assert.notEqual(mine, theirs);
  }
});

test("hairpin obeys the filter: both must send", () => {
  const { net, nat, client, seenBy } = scene({ ...NATS["EIM+APDF random"]!, hairpin: true });
  const peer = net.host({ name: "peer", addresses: ["192.168.1.11"], behind: nat }).run(ear());
  const [mine, theirs] = [seenBy(A), seenBy(A, { process: peer })];
  for (const [from, to] of [[client, theirs], [peer, mine], [client, theirs]] as const) say(from, to), net.run(10);
  assert.deepEqual([client.received, peer.received], [2, 2]);
});

function carrier(options: NatOptions) {
  const net = createNetwork({ seed: 5 });
  const place = { name: "carrier", address: "203.0.113.5", delayMs: 10, lanDelayMs: 4 };
  const outer = net.nat({ ...options, ...place });
  const home = (i: number) => {
    const inner = net.nat({ ...linux("drop"), name: `home ${i}`, address: `100.64.0.${i}`, behind: outer, delayMs: 3 });
    return net.host({ name: `host ${i}`, addresses: ["192.168.1.2"], behind: inner }).run(ear(), { ports: [40_000] });
  };
  const server = net.host({ name: "server", addresses: ["198.51.100.1"], delayMs: 10 }).run(mirror(), {
    ports: [2280],
  });
  return { net, outer, one: home(1), two: home(2), server };
}

test("behind a carrier NAT both NATs translate, and both links count", () => {
  const { net, outer, one, server } = carrier(NATS.cgn!);
  const start = net.now();
  say(one, A);
  net.run(100);
  assert.equal(server.events[0]?.at, start + 3 + 10 + 10);
  assert.equal(one.events[0]?.at, start + 46);
  assert.equal(one.events[0]?.event.text, outer.mappings()[0]?.outer);
  assert.equal(outer.mappings()[0]?.inner, "100.64.0.1:40000");
});

test("two subscribers of a carrier meet at the carrier: by its inside addresses, and by hairpin", () => {
  const { net, one, two } = carrier(NATS.cgn!);
  for (const process of [one, two]) say(process, A);
  net.run(100);
  const [mine, theirs] = [one, two].map((process) => process.events[0]!.event.text);
  for (
    const [a, b, ms] of [["100.64.0.1:40000", "100.64.0.2:40000", 3 + 4 + 3], [mine!, theirs!, 3 + 8 + 3]] as const
  ) {
    say(one, b);
    net.run(100);
    const start = net.now();
    say(two, a, { text: "meet" });
    net.run(100);
    assert.deepEqual(one.events.at(-1)?.event, { socket: 0, from: b, text: "meet", at: start + ms });
  }
});

// ------------------------------------------------------------------------------------------- Linux's clash

test("Linux shares one outside port among flows, and only a taken 5-tuple costs the port", () => {
  const { net, nat, seenBy } = scene(linux("drop"));
  const rival = net.host({ name: "rival", addresses: ["192.168.1.11"], behind: nat }).run(ear(), { ports: [40_000] });
  assert.equal(portOf(seenBy(A)), 40_000);
  assert.equal(portOf(seenBy(B, { process: rival })), 40_000);
  assert.notEqual(portOf(seenBy(A, { process: rival })), 40_000);
});

for (const [input, clash] of [["accept", true], ["drop", false]] as const) {
  test(`Linux with INPUT ${input}: a packet that came first ${clash ? "moves" : "does not move"} the answer's port`, () => {
    const { net, nat, seenBy, comesIn } = scene(linux(input));
    assert.equal(comesIn("203.0.113.5:40000", 1), false); // the peer's punch comes too early
    assert.equal(nat.mappings().length, clash ? 1 : 0);
    assert.equal(portOf(seenBy(A)), 40_000); // another 5-tuple
    assert.equal(portOf(seenBy(B)) !== 40_000, clash);
    assert.equal(comesIn("203.0.113.5:40000", 1), !clash); // and his next punches die as well
    net.run(29_800);
    assert.equal(comesIn("203.0.113.5:40000", 1), !clash); // ... and keep the bad entry alive
    net.run(29_900);
    const own = nat.mappings().filter(({ inner }) => inner === null);
    assert.deepEqual(own.map(({ ageMs }) => ageMs > 60_000), clash ? [true] : []);
    net.run(200);
    assert.equal(nat.mappings().filter(({ inner }) => inner === null).length, 0);
    net.run(120_000);
    assert.equal(portOf(seenBy(B)), 40_000); // clean again after silence
  });
}

test("Linux with INPUT accept: whoever sends first keeps the port", () => {
  const { seenBy, comesIn } = scene(linux("accept"));
  assert.equal(portOf(seenBy(B)), 40_000);
  assert.equal(comesIn("203.0.113.5:40000", 1), true);
  assert.equal(portOf(seenBy(B)), 40_000);
});

// ---------------------------------------------------------------------------------------------- TTL and v6

test("a low TTL dies on the core, after it has made the own NAT's mapping; and it does not spoil the far one", () => {
  for (const [ttl, fate] of [[1, "nat ttl"], [2, "core ttl"], [5, "core ttl"], [13, "core ttl"], [64, "far passed"]]) {
    const { net, client, nat } = scene(NATS["EIM+APDF preserving"]!);
    const far = net.nat({ ...linux("accept"), name: "far", address: "203.0.113.6" });
    const peer = net.host({ name: "peer", addresses: ["10.0.0.2"], behind: far }).run(ear(), { ports: [7000] });
    say(peer, "203.0.113.5:40000");
    net.run(100);
    const fates: string[] = [];
    net.trace = ({ node, fate }) => fates.push(`${node} ${fate}`);
    say(client, "203.0.113.6:7000", { ttl: ttl as number });
    net.run(100);
    assert.ok(fates.includes(fate as string), `${ttl}: ${fates}`);
    assert.equal(nat.mappings().length, ttl === 1 ? 0 : 1);
    assert.equal(far.mappings().length, 1);
    assert.equal(peer.received, ttl === 64 ? 1 : 0);
  }
});

test("two carrier levels and a TTL of 8: the packet passes both own NATs, and no more", () => {
  const { net, outer, one, server } = carrier(NATS.cgn!);
  say(one, A, { ttl: 8 });
  net.run(100);
  assert.equal(outer.mappings().length, 1);
  assert.equal(server.received, 0);
});

test("IPv6 is not translated, but filtered by every NAT on the way", () => {
  const filters = ["none", "EIF", "ADF", "APDF"] as const;
  for (const [rank, v6Filter] of filters.entries()) {
    const net = createNetwork();
    const outer = net.nat({ ...NATS.cgn!, name: "carrier", address: "203.0.113.5", v6Filter: "none", delayMs: 5 });
    const options = { ...NATS["APDM+APDF random"]!, v6Filter };
    const nat = net.nat({ ...options, name: "home", address: "100.64.0.1", behind: outer });
    const addresses = ["192.168.1.2", "2001:db8:1::2"];
    const client = net.host({ name: "client", addresses, behind: nat }).run(ear(), { ports: [7] });
    const lan = net.host({ name: "lan", addresses: ["2001:db8:1::3"], behind: nat }).run(ear());
    const servers = [1, 2].map((i) =>
      net.host({ name: `s${i}`, addresses: [`2001:db8:${i}::1`], delayMs: 5 }).run(mirror(), { ports: [1, 2] })
    );
    const me = "[2001:db8:1::2]:7";
    say(lan, me); // never filtered
    say(servers[1]!, me); // before the client has said anything
    net.run(100);
    assert.deepEqual([lan.sent, client.received], [1, rank === 0 ? 2 : 1]);
    client.events.length = 0;
    say(client, "[2001:db8:1::1]:1");
    net.run(100);
    assert.deepEqual(heard(client), [me]);
    for (const [server, socket] of [[0, 0], [0, 1], [1, 0]] as const) say(servers[server]!, me, { socket });
    net.run(100);
    assert.equal(client.events.length - 1, [3, 3, 2, 1][rank]);
    assert.equal(nat.mappings().length, rank === 0 ? 0 : 1);
  }
});

test("IPv6 behind a Linux router: one host talks to two, whoever knocked before", () => {
  const net = createNetwork();
  const nat = net.nat({ ...linux("accept"), name: "nat", address: "203.0.113.5" });
  const client = net.host({ name: "client", addresses: ["2001:db8:1::2"], behind: nat }).run(ear(), { ports: [7] });
  const peers = [2, 3].map((i) =>
    net.host({ name: `${i}`, addresses: [`2001:db8:${i}::1`] }).run(ear(), { ports: [5] })
  );
  const meet = () => {
    for (const peer of peers) say(peer, "[2001:db8:1::2]:7");
    net.run(10);
  };
  meet();
  assert.deepEqual(nat.mappings(), []);
  for (const i of [2, 3]) say(client, `[2001:db8:${i}::1]:5`);
  net.run(1);
  for (let i = 0; i < 4; i++) net.run(20_000), meet();
  assert.equal(client.received, 8);
});

test("without an address of the destination's family nothing is sent", () => {
  const net = createNetwork();
  const fates: string[] = [];
  net.trace = ({ fate }) => fates.push(fate);
  const process = net.host({ name: "a", addresses: ["192.0.2.1"] }).run(ear());
  for (const to of ["[2001:db8::1]:5", "nonsense", "192.0.2.9:0"]) say(process, to);
  process.perform([{ kind: "send", socket: 0, to: "192.0.2.9:1", data: new Uint8Array(65_508) }]);
  const bound = net.host({ name: "b", addresses: ["192.0.2.2", "2001:db8::2"] });
  say(bound.run(ear(), { ports: [{ port: 5, address: "192.0.2.2" }] }), "[2001:db8::2]:5");
  say(bound.run(ear(), { ports: [{ port: 6, address: "192.0.2.77" }] }), "192.0.2.1:5"); // not an address of this host
  assert.deepEqual(fates, ["no-route", "no-route", "no-route", "too-long", "no-route", "no-route"]);
});

// ---------------------------------------------------------------------------------------- a bad core, attackers

/** A thousand datagrams, 1 ms apart, and everything that happened to them. */
function storm(seed: number, conditions: Partial<Conditions>) {
  const net = createNetwork({ seed, ...conditions });
  const trace: TraceRecord[] = [];
  net.trace = (record) => trace.push(record);
  const a = net.host({ name: "a", addresses: ["192.0.2.1"], delayMs: 10 }).run(ear());
  const b = net.host({ name: "b", addresses: ["192.0.2.2"], delayMs: 10 }).run(ear(), { ports: [9] });
  for (let i = 0; i < 1000; i++) say(a, "192.0.2.2:9", { text: `${i}` }), net.run(1);
  net.run(1000);
  return { net, trace, a, b, numbers: heard(b).map(Number) };
}

test("the same seed gives the same trace, another seed another one", () => {
  const bad = { loss: 0.1, duplicate: 0.1, reorder: 0.1, jitterMs: 5 };
  assert.deepEqual(storm(1, bad).trace, storm(1, bad).trace);
  const ports = (seed: number) => scene2(seed).nat.mappings().map(({ outer }) => outer);
  assert.notDeepEqual(storm(1, bad).numbers, storm(2, bad).numbers);
  assert.deepEqual(ports(1), ports(1));
  assert.notDeepEqual(ports(1), ports(2));
  const insides = [1, 2].map((seed) => scene2(seed).nat.mappings().map(({ inner }) => inner));
  assert.notDeepEqual(insides[0], insides[1]);
});

function scene2(seed: number) {
  const net = createNetwork({ seed });
  const nat = net.nat({ ...NATS["EIM+APDF random"]!, name: "nat", address: "203.0.113.5" });
  say(net.host({ name: "a", addresses: ["10.0.0.1"], behind: nat }).run(ear()), "192.0.2.1:9");
  return { net, nat };
}

test("loss, duplication, reordering and jitter happen as often as they should, and not at all by default", () => {
  const sorted = (numbers: number[]) => numbers.every((number, i) => i === 0 || numbers[i - 1]! <= number);
  const calm = storm(1, {});
  assert.deepEqual(calm.numbers, Array.from({ length: 1000 }, (_, i) => i));
  const lossy = storm(1, { loss: 0.3 });
  assert.ok(lossy.numbers.length > 640 && lossy.numbers.length < 760 && sorted(lossy.numbers));
  const double = storm(1, { duplicate: 0.2 });
  assert.ok(double.numbers.length > 1140 && double.numbers.length < 1260 && new Set(double.numbers).size === 1000);
  const mixed = storm(1, { reorder: 0.1 });
  assert.ok(mixed.numbers.length === 1000 && !sorted(mixed.numbers));
  const late = mixed.b.events.filter(({ at, event }) => at - mixed.b.events[0]!.at - Number(event.text) === 30);
  assert.ok(late.length > 60 && late.length < 140);
  const shaky = storm(1, { jitterMs: 0.5 });
  assert.ok(shaky.numbers.length === 1000 && sorted(shaky.numbers));
  const extra = shaky.b.events.map(({ at, event }) => at - shaky.net.now() + 2000 - 20 - Number(event.text));
  assert.ok(Math.min(...extra) >= 0 && Math.max(...extra) < 0.5);
  assert.ok(Math.abs(extra.reduce((sum, ms) => sum + ms) / 1000 - 0.25) < 0.02);
  const behindNat = scene(NATS["EIM+APDF random"]!, { duplicate: 1 });
  behindNat.seenBy(A);
  assert.deepEqual([behindNat.servers[0]!.received, behindNat.client.received], [2, 4]);
});

test("conditions can be replaced at run time, and changed one by one", () => {
  const { net, a, b } = storm(1, { loss: 1 });
  assert.equal(b.received, 0);
  net.conditions = {};
  assert.equal(net.conditions.loss, 0);
  say(a, "192.0.2.2:9");
  net.run(100);
  net.conditions.loss = 1;
  say(a, "192.0.2.2:9");
  net.run(100);
  assert.equal(b.received, 1);
});

test("block() drops what it is told to, on the core and on a LAN, until it is undone", () => {
  const { net, nat, client, seenBy } = scene(NATS["EIM+APDF random"]!);
  const lan = net.host({ name: "lan", addresses: ["192.168.1.11"], behind: nat }).run(ear(), { ports: [5] });
  const undo = net.block(({ host, to, node }) => (host === "client" && to === A) || node === "nat");
  assert.equal(seenBy(A), "nothing");
  assert.notEqual(seenBy(B), "nothing");
  say(client, "192.168.1.11:5");
  net.run(10);
  assert.equal(lan.received, 0);
  undo();
  assert.notEqual(seenBy(A), "nothing");
  say(client, "192.168.1.11:5");
  net.run(10);
  assert.equal(lan.received, 1);
});

test("an attacker injects with any source, and only what a NAT admits gets in", () => {
  const { net, client, seenBy } = scene(NATS["EIM+APDF random"]!);
  const to = seenBy(A);
  client.events.length = 0;
  const start = net.now();
  net.inject({ from: "6.6.6.6:6", to, data: bytes("stranger") });
  net.inject({ from: A, to, data: bytes("spoofed") });
  net.run(100);
  assert.deepEqual(client.events.map(({ event }) => event), [{ socket: 0, from: A, text: "spoofed", at: start + 10 }]);
  assert.throws(() => net.inject({ from: "x", to, data: bytes("") }), /Cannot inject/);
});

test("a tap sees every datagram on the core as its outer header is, may drop it and may change it", () => {
  const { net, client, servers, seenBy } = scene(NATS["EIM+APDF sequential"]!);
  const seen: string[] = [];
  const undo = net.tap(({ from, to, data, host }) => {
    seen.push(`${host}: ${from} > ${to}`);
    if (to === B) return "drop";
    if (to === A) data[0] = "y".charCodeAt(0);
  });
  const mine = seenBy(A);
  assert.equal(seenBy(B), "nothing");
  net.inject({ from: "6.6.6.6:6", to: "6.6.6.7:7", data: bytes("") });
  net.run(10);
  const expected = [
    `client: ${mine} > ${A}`,
    `server 0: ${A} > ${mine}`,
    `client: ${mine} > ${B}`,
    `: 6.6.6.6:6 > 6.6.6.7:7`,
  ];
  assert.deepEqual(seen, expected);
  assert.deepEqual(heard(servers[0]!), ["y"]);
  undo();
  assert.notEqual(seenBy(B), "nothing");
  assert.equal(seen.length, 4);
  assert.equal(client.received, 2);
});

test("the trace tells every hop, with the outer header and the inside endpoint", () => {
  const { net, seenBy } = scene(NATS["EIM+APDF random"]!);
  const hops: string[] = [];
  const start = net.now();
  net.trace = ({ at, node, fate, from, to, inner = "-", bytes, ttl }) =>
    hops.push(`${at - start} ${node} ${fate} ${from} ${to} ${inner} ${bytes} ${ttl}`);
  const mine = seenBy(A);
  const me = "192.168.1.10:40000";
  assert.deepEqual(hops, [
    `0 client sent ${me} ${A} - 1 64`,
    `0 nat passed ${mine} ${A} ${me} 1 63`,
    `10 core passed ${mine} ${A} - 1 51`,
    `20 server 0 delivered ${mine} ${A} - 1 51`,
    `20 server 0 sent ${A} ${mine} - ${mine.length} 64`,
    `30 core passed ${A} ${mine} - ${mine.length} 52`,
    `40 nat passed ${A} ${me} ${me} ${mine.length} 51`,
    `40 client delivered ${A} ${me} - ${mine.length} 51`,
  ]);
});

test("random() is uniform, and independent for near seeds", () => {
  const draw = (seed: number | string) => {
    const next = random(seed);
    return Array.from({ length: 4000 }, next);
  };
  for (const seed of [0, 1, "1 core", "2 core"]) {
    const values = draw(seed);
    const mean = values.reduce((sum, value) => sum + value) / 4000;
    assert.ok(values.every((value) => value >= 0 && value < 1) && Math.abs(mean - 0.5) < 0.02);
  }
  const [one, two] = [draw(1), draw(2)];
  const product = one.reduce((sum, value, i) => sum + (value - 0.5) * (two[i]! - 0.5), 0) / 4000;
  assert.ok(Math.abs(product) < 0.006);
});
