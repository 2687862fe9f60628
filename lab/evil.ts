/**
 * A server that says something else than it should, to whom it likes: the tests say what.
 *
 * @module
 */
import { type Control, type ControlBody, type Datagram, decode, encode, type Endpoint } from "../protocol.ts";
import { controlKeys, decodeStun, diffieHellman, encodeStunResponse, type KeyPair, publicNonce } from "../protocol.ts";
import type { Stun } from "../protocol.ts";
import { takeOver } from "./hostile.ts";
import type { World } from "./scenario.ts";

/** A server that says something else than what its machine says, sealed with the right keys. */
export interface Evil {
  onSend: (message: Control, to: string) => ControlBody[]; // instead of this message to that user: others
  /** Before the machine hears it: another message, or none. */
  onHear: (message: Control, from: string) => ControlBody | null;
  /** What is said to somebody who asks how he is seen; without it, the truth. */
  onStun: ((asked: Stun, from: Endpoint) => { mapped: Endpoint; other?: Endpoint }) | null;
  tell(name: string, message: ControlBody): void; // says something of its own
  nonceOf(name: string): string; // what a user's WELCOME said
}

export function evil(world: World, keys: KeyPair): Evil {
  interface Prey {
    name: string;
    key: Uint8Array;
    macs: { toServer: Uint8Array; toClient: Uint8Array };
    at: Endpoint;
    nonce: string;
    sent: number;
  }
  const byToken = new Map<string, Prey>(), byName = new Map<string, Prey & { token: string }>();
  const logins = new Map<string, { name: string; key: Uint8Array }>();
  const sealFor = (token: string, message: ControlBody) => {
    const prey = byToken.get(token)!;
    return encode(message, { id: token, counter: ++prey.sent, key: prey.macs.toClient });
  };
  const self: Evil = {
    onSend: (message) => [message],
    onHear: (message) => message,
    onStun: null,
    tell(name, message) {
      const { token, at } = byName.get(name)!;
      world.server.perform([{ kind: "send", socket: 0, to: at, data: sealFor(token, message) }]);
    },
    nonceOf: (name) => byName.get(name)!.nonce,
  };
  takeOver(world, (server) => ({
    ...server,
    receive(datagram, now) {
      const { socket, from: to } = datagram, asked = self.onStun && decodeStun(datagram.data);
      if (asked) return [{ kind: "send", socket, to, data: encodeStunResponse(asked, self.onStun!(asked, to)) }];
      const message = decode(datagram.data);
      if (message?.type === "LOGIN") logins.set(message.id, { name: message.name, key: message.key });
      const prey = message && byToken.get(message.id);
      let heard: Datagram | null = datagram;
      if (prey && message.type !== "LOGIN") {
        const instead = self.onHear(message, prey.name);
        if (instead === null) heard = null;
        else if (instead !== message) {
          const data = encode(instead, { id: message.id, counter: message.counter, key: prey.macs.toServer });
          heard = { ...datagram, data };
        }
      }
      return heard === null ? [] : server.receive(heard, now).flatMap((effect) => {
        const said = effect.kind === "send" ? decode(effect.data) : null;
        if (effect.kind !== "send" || !said) return [effect];
        if (said.type === "WELCOME") {
          const { name, key } = logins.get(said.id)!;
          const macs = controlKeys(diffieHellman(keys.secret, key)!, said.token);
          const prey = { name, key, macs, at: effect.to, nonce: publicNonce(said.id), sent: said.counter };
          byToken.set(said.token, prey);
          byName.set(name, { ...prey, token: said.token });
          const [instead] = self.onSend(said, name);
          return [{ ...effect, data: encode(instead!, { id: said.id, counter: said.counter, key: macs.toClient }) }];
        }
        const to = byToken.get(said.id);
        if (!to) return [effect];
        return self.onSend(said, to.name).map((message) => ({ ...effect, data: sealFor(said.id, message) }));
      });
    },
  }));
  return self;
}

/** What a message says about users, changed. */
export function rewrite(
  message: Control,
  change: (user: { name: string; nonce: string; key: Uint8Array }) => object,
): Control {
  if ("users" in message) {
    return { ...message, users: message.users.map((user) => ({ ...user, ...change(user) })) };
  }
  if ("peer" in message && typeof message.peer === "object") {
    return { ...message, peer: { ...message.peer, ...change(message.peer) } } as Control;
  }
  return message;
}
