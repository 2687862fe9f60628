// The simulated internet, proved on machines of ten lines: everything else in lab/ stands on it.
import assert from "node:assert/strict";
import { test } from "node:test";
import type { Datagram, Effect, Endpoint, Machine } from "../protocol.ts";
import { type Conditions, createNetwork, linux, NATS, random, type TraceRecord } from "./network.ts";
import { A, B, bytes, ear, echo, heard, type Note, say, scene, waker } from "./toys.ts";

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
  set(2000); // again
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

test("a virtual day of one-second ticks by two machines is 86,400 wakes of each, and none in vain", () => {
  const net = createNetwork({ loss: 0.05 });
  const nat = net.nat({ ...linux("accept"), name: "nat", address: "203.0.113.5", delayMs: 20 });
  let wakes = 0;
  const ticker = (to: Endpoint): Machine => {
    let at = net.now() + 1000;
    const send = (now: number): Effect[] => {
      wakes++;
      at = now + 1000;
      return [{ kind: "send", socket: 0, to, data: bytes("tick") }];
    };
    return { opened: () => [], receive: () => [], wakeAt: () => at, wake: send };
  };
  const a = net.host({ name: "a", addresses: ["192.168.1.2"], behind: nat }).run(ticker("198.51.100.1:9"));
  const b = net.host({ name: "b", addresses: ["198.51.100.1"] }).run(ticker("203.0.113.5:9"), { ports: [9] });
  net.run(86_400_000);
  assert.deepEqual([a.sent, b.sent, wakes], [86_400, 86_400, 2 * 86_400]);
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
