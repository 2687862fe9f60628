/**
 * The worlds of the oracle that are about people: who they are, under which name and with which key, and what they say.
 *
 * @module
 */
import { decode } from "../protocol.ts";
import { crowd, join, login, type Player } from "./scenario.ts";
import { again, ask, blockDirect, cutOff, EIM, pair, part, psk, talk, world } from "./worlds.ts";

// ---------------------------------------------------------------------------------------------------- names and keys

world("names: taken, and free when its holder has vanished", {}, (world) => {
  const [alice] = pair(world, {}, {});
  const thief = join(world, "alice", {});
  world.net.run(3_000);
  alice.process.stop();
  world.net.run(61_000);
  const heir = join(world, "alice", {});
  world.net.run(3_000);
  heir.send("bob", "the heir");
  thief.send("bob", "the thief");
  world.net.run(3_000);
});
world("names: kept for who comes back", {}, (world) => {
  const keys = world.keys(), bob = join(world, "bob"), alice = join(world, "alice", { keys, keepName: true });
  login(world, alice, bob);
  alice.process.stop();
  world.net.run(62_000);
  bob.send("alice", "gone?");
  join(world, "alice", {});
  world.net.run(2_000);
  const back = again(world, alice, { keys, keepName: true });
  login(world, back);
  talk(world, bob, back);
  back.command({ command: "exit" });
  world.net.run(1_000);
  const heir = join(world, "alice", {});
  login(world, heir);
  talk(world, bob, heir);
});
world("names: kept, and free after five minutes", {}, (world) => {
  const alice = join(world, "alice", { keepName: true });
  login(world, alice);
  alice.process.stop();
  world.net.run(355_000);
  join(world, "alice", {});
  world.net.run(2_000);
  world.net.run(10_000);
  join(world, "alice", {});
  world.net.run(2_000);
});
world("names: bad ones, and long ones", {}, (world) => {
  const names = [
    "two words",
    "",
    "x".repeat(33),
    "tab\tname",
    "x".repeat(32),
    "Ümläut",
    "\u{1f600}".repeat(8),
    "a\u0301",
  ];
  const players = names.map((name, i) => {
    const player = join(world, `player-${i}`, { name });
    return Object.assign(player, { name });
  });
  world.net.run(5_000);
  for (const player of players) players.forEach((other, i) => player.send(other.name, `${i}`));
  world.net.run(20_000);
});
world("names: who lost his for minutes gets it back as soon as it is free", {}, (world) => {
  const alice = join(world, "alice");
  login(world, alice);
  cutOff(world, alice, 66_000);
  world.net.run(65_000);
  const thief = join(world, "alice", { address: "198.51.100.99" });
  world.net.run(600_000);
  thief.command({ command: "exit" });
  world.net.run(30_000);
});
for (const keys of ["a new key", "the same key"] as const) {
  for (const [how, nat] of [["directly", "EIM+APDF random"], ["over the relay", "APDM+APDF random"]] as const) {
    world(`keys: started again with ${keys}, ${how}`, {}, (world) => {
      const own = keys === "the same key" ? { keys: world.keys() } : {};
      const [alice, bob] = pair(world, { nat }, { nat, ...own });
      talk(world, alice, bob);
      bob.process.stop();
      const second = again(world, bob, own);
      talk(world, alice, second, { count: 20 });
      second.command({ command: "exit" });
      talk(world, alice, second, { count: 20 });
      const third = again(world, bob, own);
      talk(world, alice, third, { count: 20 });
      world.net.run(20_000);
    });
  }
}
world("keys: one logs in from two places with the same key", {}, (world) => {
  const keys = world.keys(), [alice, bob] = pair(world, EIM, { ...EIM, keys });
  talk(world, alice, bob);
  world.net.run(1_000);
  const second = join(world, "bob", { ...EIM, keys });
  talk(world, alice, second, { count: 20 });
  world.net.run(60_000);
  talk(world, alice, bob, { count: 20 });
});
for (const when of ["before the first message", "after it"]) {
  world(`keys: verified ${when}, then changed`, {}, (world) => {
    const [alice, bob] = pair(world);
    if (when === "after it") talk(world, alice, bob);
    alice.command({ command: "verify", peer: "bob" });
    alice.command({ command: "verify", peer: "nobody" });
    alice.command({ command: "verify", peer: "no name" });
    world.net.run(1_000);
    talk(world, alice, bob);
    bob.command({ command: "exit" });
    world.net.run(1_000);
    const other = again(world, bob);
    talk(world, alice, other, { count: 20 });
    alice.command({ command: "ping", peer: "bob", count: 2 });
    world.net.run(20_000);
    alice.command({ command: "verify", peer: "bob" });
    world.net.run(1_000);
    talk(world, alice, other, { count: 20 });
  });
}
const SECRETS: [string, string, string][] = [["equal", "x", "x"], ["different", "x", "y"], ["one-sided", "x", ""]];
for (const [what, one, other] of SECRETS) {
  world(`keys: secrets ${what}`, {}, (world) => {
    const secret = (words: string) => words ? { ...EIM, psk: psk(words) } : EIM;
    const [alice, bob] = pair(world, secret(one), secret(other));
    for (const [one, other] of [[alice, bob], [bob, alice]] as const) one.send(other.name, "both at once");
    talk(world, alice, bob);
    ask(world, alice, "bob");
    world.net.run(20_000);
    for (let i = 0; i < 12; i++) {
      const peer = again(world, bob, secret(other)); // each login is warned of once
      bob.process.stop();
      world.net.run(3_000);
      peer.send("alice", "it is me");
      world.net.run(3_000);
      peer.command({ command: "exit" });
    }
  });
}
world("keys: both call at once", { jitterMs: 1 }, (world) => {
  for (let i = 0; i < 4; i++) {
    const [alice, bob] = [`alice-${i}`, `bob-${i}`].map((name) => join(world, name, EIM)) as [Player, Player];
    login(world, alice, bob);
    world.net.run(1_000);
    alice.send(bob.name, "a 0");
    bob.send(alice.name, "b 0");
    world.net.run(3_000);
    talk(world, alice, bob);
  }
});
world("keys: both call at once, and are started again at once", { jitterMs: 30, loss: 0.1 }, (world) => {
  let [alice, bob] = pair(world);
  for (let i = 0; i < 6; i++) {
    alice.send("bob", "a");
    bob.send("alice", "b");
    world.net.run(500);
    for (const player of [alice, bob]) player.command({ command: "exit" });
    [alice, bob] = [again(world, alice), again(world, bob)];
  }
  talk(world, alice, bob, { count: 20 });
});

// ---------------------------------------------------------------------------------------------------- what is said

world("said: nothing, too much, to nobody, to oneself", {}, (world) => {
  const [alice, bob] = pair(world);
  for (const text of ["", part(65_536), part(65_537), "é".repeat(32_768), "\ufeffbom", "\ud800", "\0\n"]) {
    alice.send("bob", text);
  }
  for (const to of ["nobody", "no name", "", "alice", "BOB", "x".repeat(40)]) alice.send(to, "hi");
  world.net.run(20_000);
  alice.send("alice", "again");
  alice.command({ command: "ping", peer: "alice", count: 2 });
  for (const peer of ["nobody", "no name", ""]) {
    alice.command({ command: "ping", peer, count: 1 });
    alice.command({ command: "path", peer });
    alice.command({ command: "verify", peer });
  }
  alice.command({ command: "getu", prefix: "x".repeat(33) });
  alice.command({ command: "getu", prefix: "b" });
  world.net.run(20_000);
  bob.command({ command: "path", peer: null });
  world.net.run(60_000);
});
for (const loss of [0, 0.05]) {
  for (const nat of ["EIM+APDF random", "APDM+APDF random"]) {
    world(`said: 64 KiB each way, ${nat}, ${100 * loss} % lost`, {}, (world) => {
      const [alice, bob] = pair(world, { nat }, { nat });
      alice.send("bob", part(65_536));
      world.net.run(2_000);
      world.net.conditions = { loss };
      for (const [one, other] of [[alice, bob], [bob, alice]] as const) one.send(other.name, part(65_536));
      world.net.run(20_000);
    });
  }
}
world("said: the path dies under a long message", {}, (world) => {
  const [alice, bob] = pair(world);
  talk(world, alice, bob);
  world.net.conditions = { loss: 0.2 };
  alice.send("bob", part(60_000));
  world.net.run(100);
  blockDirect(world);
  world.net.run(20_000);
});
world("said: to somebody who is gone", {}, (world) => {
  const [alice, bob] = pair(world);
  talk(world, alice, bob);
  bob.process.stop();
  alice.send("bob", "are you there?");
  alice.command({ command: "ping", peer: "bob", count: 3 });
  world.net.run(20_000);
  alice.command({ command: "ping", peer: "bob", count: 3 });
  world.net.run(60_000);
  alice.send("bob", "and now?");
  alice.command({ command: "ping", peer: "bob", count: 3 });
  world.net.run(20_000);
});
world("said: one behind another that was given up", {}, (world) => {
  const [alice] = pair(world, { direct: false }, {});
  alice.send("bob", "zero");
  world.net.run(2_000);
  const unblock = world.net.block(({ bytes, host }) => bytes > 500 && host === "alice");
  alice.send("bob", part(700));
  world.net.run(100);
  alice.send("bob", "two");
  world.net.run(20_000);
  unblock();
  alice.send("bob", "three");
  world.net.run(5_000);
});
world("said: one behind a long one that was given up", {}, (world) => {
  const [alice] = pair(world, { direct: false }, {});
  alice.send("bob", "zero");
  world.net.run(2_000);
  let passed = 0;
  const unblock = world.net.block(({ node, bytes, host }) =>
    node === "core" && bytes > 500 && host === "alice" && ++passed > 2
  );
  alice.send("bob", part(4_000));
  alice.send("bob", "two");
  world.net.run(20_000);
  unblock();
  alice.send("bob", "three");
  world.net.run(20_000);
});
for (let passing = 1; passing < 4; passing++) {
  world(`said: the peer is started again in the middle of a message, after ${passing} parts`, {}, (world) => {
    const [alice, bob] = pair(world, { direct: false }, { direct: false });
    alice.send("bob", "first");
    world.net.run(1_000);
    let passed = 0;
    const unblock = world.net.block(({ node, host, data }) =>
      node === "core" && host === "alice" && data.length > 800 && ++passed > passing
    );
    alice.send("bob", part(4_200));
    for (let i = 0; i < 20; i++) alice.send("bob", `${i}`);
    world.net.run(1_000);
    bob.command({ command: "exit" });
    world.net.run(1_000);
    const second = again(world, bob, { direct: false });
    login(world, second);
    unblock();
    alice.send("bob", "last");
    world.net.run(10_000);
  });
}
world("said: the peer says once more that it has nothing yet", {}, (world) => {
  const [alice, bob] = pair(world, { direct: false }, { direct: false });
  alice.command({ command: "ping", peer: "bob", count: 1 });
  let answers = 0, parts = 0;
  world.net.block(({ node, host, to, data }) =>
    node === "core" &&
    (host === "server"
      ? to.startsWith(alice.host.addresses[0]!) && decode(data)?.type === "RELAYED" && answers++ === 0
      : host === "alice" && data.length > 700 && parts++ === 0)
  );
  alice.send("bob", part(700));
  world.net.run(10_000);
  talk(world, alice, bob);
});
world("said: 1,000 conversations, of which the oldest are forgotten", {}, (world) => {
  const [alice, bob] = pair(world, { direct: false }, { nat: "APDM+APDF sequential" });
  const carol = join(world, "carol", EIM); // bob's path to her is from a socket of its own, and he never writes to her
  login(world, carol);
  carol.send("bob", "hi");
  world.net.run(5_000);
  const others = Array.from({ length: 1_000 }, (_, i) => `user-${i}`);
  crowd(world, others);
  alice.send("bob", "first");
  bob.send("alice", "second");
  world.net.run(1_000);
  for (const other of others.slice(1)) bob.send(other, "hi");
  world.net.run(1_000);
  bob.send(others[0]!, "the last one for whom there is room");
  bob.send("alice", "none here");
  bob.command({ command: "ping", peer: "alice", count: 1 });
  alice.send("bob", "nor there");
  world.net.run(12_000);
  const unblock = world.net.block(({ host, data }) => host === "alice" && data.length > 700);
  for (const text of [part(700), "1", "2"]) alice.send("bob", text);
  world.net.run(1_000);
  bob.send(others[0]!, "hi");
  world.net.run(2_000);
  unblock();
  talk(world, alice, bob);
  for (const other of others.slice(0, 3)) bob.send(other, "hi");
  talk(world, alice, bob);
  world.net.run(10_000);
});
world("many: 20 peers of one client", { jitterMs: 5 }, (world) => {
  const kinds = [null, "EIM+APDF random", "linux drop", "EIM+EIF random", "APDM+APDF sequential"];
  const alice = join(world, "alice", EIM);
  const peers = Array.from({ length: 20 }, (_, i) => join(world, `peer-${i}`, { nat: kinds[i % kinds.length]! }));
  login(world, alice, ...peers);
  for (let round = 0; round < 3; round++) {
    for (const { name } of peers) alice.send(name, `round ${round}`);
    world.net.run(2_000);
    for (const peer of peers) peer.send("alice", `answer ${round}`);
    world.net.run(2_000);
  }
  alice.command({ command: "path", peer: null });
  world.restartServer();
  world.net.run(60_000);
});
for (const loss of [0, 0.1]) {
  world(`many: a list of 700 users, ${100 * loss} % lost`, {}, (world) => {
    crowd(world, Array.from({ length: 700 }, (_, i) => `user-${i}`));
    const alice = join(world, "alice", EIM), bob = join(world, "bob", EIM);
    login(world, alice, bob);
    world.net.conditions = { loss };
    for (const prefix of ["", "user-6", "user-69", "bob", "zzz", "user-1"]) alice.command({ command: "getu", prefix });
    alice.command({ command: "verify", peer: "user-333" });
    world.net.run(20_000);
    bob.send("user-77", "nobody answers");
    talk(world, alice, bob);
    world.net.run(90_000);
    alice.command({ command: "getu", prefix: "" });
    world.net.run(1_000);
  });
}
