/**
 * Forgers are off the path, know all addresses, names, public keys and nonces, and write any source address: they change
 * nothing.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type ControlBody, decode, encode } from "../protocol.ts";
import { encodeClock, encodeHandshake, encodeInner, initiate, type Peer, sealPeer } from "../protocol.ts";
import { concat, controlKeys, diffieHellman, hex, hostOf, keysFrom } from "../protocol.ts";
import { VERSION } from "../protocol.ts";
import { corpus, dice, like, mayAnswer, NO_ID, part, prologue, rogueCrowd, SERVER, typeOf } from "./hostile.ts";
import { VICTIM, village, watchVictim } from "./hostile.ts";
import { createWorld, join, login } from "./scenario.ts";
import { LONG, many, texts } from "./testing.ts";

test(
  "a forger off the path, who knows all but the secrets and writes any source address, changes nothing",
  LONG,
  () => {
    const { world, all, alice, bob, homes, talk, check, list } = village(5);
    const tools = dice("forger");
    const [mallory] = rogueCrowd(world, ["mallory"], alice);
    mallory!.say(like("GETALLUSER", { prefix: "", after: "" }));
    world.net.run(1_000);
    const users = mallory!.users;
    mallory!.say(like("LOGOUT", {}));
    world.net.run(1_000);

    const hits = watchVictim(world);
    let asked = 0;
    const started = world.net.now();
    const { server } = world;
    const serverEvents = server.events.length, clientEvents = all.map(({ process }) => process.events.length);
    const mine = keysFrom(tools.bytes(32));
    const endpoints = [...homes.values(), SERVER, "192.0.2.1:2281", `${VICTIM}:53`, `${VICTIM}:2280`];
    const id = () => tools.next() < 0.3 ? NO_ID : hex(tools.bytes(8));
    const people = [...users.values()];
    const messages = corpus.map(({ data }) => decode(data)).filter((message) => message !== null);
    const forge = (): Uint8Array => {
      const user = tools.pick(people), other = tools.pick(people), control = tools.pick(messages);
      switch (tools.below(6)) {
        case 0: // any message of the protocol, with what the forger knows in place of what he does not
          return encode({
            ...control,
            ...{
              name: user.name,
              to: user.name,
              from: user.name,
              peer: control.type === "PUNCHED" ? user.name : undefined,
            },
            ...("peer" in control && typeof control.peer === "object"
              ? { peer: { ...control.peer, ...user, candidates: [`${VICTIM}:53`] } }
              : {}),
            ...("users" in control ? { users: [{ ...user, key: mine.public, public: `${VICTIM}:53` }] } : {}),
            ...("local" in control ? { local: [`${VICTIM}:53`] } : {}),
            ...("key" in control ? { key: tools.pick([mine.public, user.key]) } : {}),
          } as ControlBody, {
            id: tools.next() < 0.3 ? user.nonce : id(),
            counter: Math.floor(tools.next() * 2 ** 48),
            key: tools.bytes(16),
          });
        case 1: { // a handshake in somebody's name, with the forger's keys
          const begun = initiate({
            own: mine,
            peer: user.key,
            psk: new Uint8Array(32),
            prologue: prologue(other, user),
            ephemeral: keysFrom(tools.bytes(32)),
          }, concat(tools.bytes(8), encodeClock(1), encodeInner(part(0, "forged"))))!;
          return encodeHandshake({ type: "P2PFIRST", from: 1, probe: 1, noise: begun.message });
        }
        case 2:
          return encodeHandshake({
            type: "P2PSECOND",
            to: tools.below(2 ** 32),
            from: 1,
            noise: tools.bytes(56),
            sealed: sealPeer(part(0, "forged"), { index: tools.below(2 ** 32), counter: 0, key: tools.bytes(32) }),
          });
        case 3:
          return sealPeer(tools.pick<Peer>([part(0, "forged"), { type: "P2PTRASH", probe: 1 }]), {
            index: tools.below(2 ** 32),
            counter: tools.below(2 ** 20),
            key: tools.bytes(32),
          });
        case 4: // with the nonce of a login for a token
          return encode(tools.pick<ControlBody>([like("LOGOUT", {}), like("KEEPALIVE", {})]), {
            id: user.nonce,
            counter: 2 ** 47,
            key: tools.bytes(16),
          });
        default: // who am I? The name is taken
          return encode(like("LOGIN", { cookie: id(), key: mine.public, name: user.name }), {
            id: id(),
            counter: 2 ** 47,
            key: tools.bytes(16),
          });
      }
    };
    for (let i = 0; i < many(20_000, 4_000); i++) {
      const data = forge(), from = tools.pick(endpoints), to = tools.pick([...homes.values(), SERVER]);
      if (hostOf(from) === hostOf(to)) continue;
      world.net.inject({ from, to, data });
      if (hostOf(from) === VICTIM) asked += data.length;
      if (i % 100 === 0) world.net.run(20);
    }
    world.net.run(1_000);
    assert.ok(hits.length > many(100, 20), "nobody was asked in the victim's name");
    for (const { data, from } of hits) assert.ok(mayAnswer(data, data), `${typeOf(data)} from ${from}`);
    assert.ok(hits.reduce((sum, { bytes }) => sum + bytes, 0) <= asked);
    assert.equal(world.server.events.length, serverEvents, "the server has seen something happen");
    all.forEach(({ process, name }, i) =>
      assert.deepEqual(
        process.events.slice(clientEvents[i]!).map(({ event }) => event),
        [],
        `${name} was told something`,
      )
    );
    talk();
    check();
    assert.deepEqual(new Map(list().map((user) => [user.name, user.public])), homes);
    assert.ok([alice, bob].every((player) => player.events("reconnecting").every(({ at }) => at < started)));
  },
);

test("a forger who is a user sees the nonce of a login whose WELCOME is lost, and still cannot pass for the server", () => {
  for (const skewMs of [0, 300, -300]) {
    const world = createWorld({ seed: 3 });
    const mallory = join(world, "mallory");
    login(world, mallory);
    world.net.run(2_000);
    let isLost = false;
    world.net.tap(({ host, data }) => {
      if (!isLost && host === "server" && decode(data)?.type === "WELCOME") return isLost = true, "drop";
    });
    const own = world.keys(), token = "00000000000000aa";
    const { receive } = mallory.client;
    let forged = 0;
    mallory.client.receive = (datagram, now) => { // her own client hears it, and she reads along
      const message = decode(datagram.data);
      const alice = message?.type === "USERS" ? message.users.find(({ name }) => name === "alice") : undefined;
      if (alice && forged === 0) {
        const macs = controlKeys(diffieHellman(own.secret, alice.key)!, token);
        const put = (data: Uint8Array) => world.net.inject({ from: SERVER, to: alice.public, data });
        const cookie = like("COOKIE", {
          cookie: "1".repeat(16),
          key: own.public,
          terms: { version: VERSION, flag: false },
        });
        for (let counter = Math.floor(now) - 800; counter < now + 400; counter++, forged++) {
          put(encode(cookie, { id: alice.nonce, counter }));
        }
        const welcome = like("WELCOME", {
          token,
          public: alice.public,
          secondPort: 1,
          thirdPort: 1,
          total: 1,
          users: [],
        });
        world.net.after(1, () => put(encode(welcome, { id: alice.nonce, counter: 1, key: macs.toClient })));
      }
      return receive(datagram, now);
    };
    const alice = join(world, "alice");
    alice.jump(skewMs);
    world.net.run(10_000);
    assert.ok(forged > 1_000);
    assert.deepEqual(
      alice.process.events.map(({ event }) => event.event).filter((event) => event !== "users"),
      ["login"],
    );
    mallory.send("alice", "hi");
    world.net.run(2_000);
    assert.deepEqual(texts(alice), ["hi"]);
  }
});
