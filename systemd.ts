/**
 * Tells the service manager how the server is: sd_notify(3), a datagram to the unix socket that `NOTIFY_SOCKET` names.
 *
 * Bun has no such sockets, so it goes through the C library. Where that cannot be had, systemd's own command
 * `systemd-notify` sends it, as another process: the unit then needs `NotifyAccess=all`. Without `NOTIFY_SOCKET` nothing
 * is done. Only the supervisor calls this; its workers have no `NOTIFY_SOCKET`. Nothing blocks, since the workers ask the
 * supervisor for each connection, also for one from a manager that wants to see for itself before it reads on.
 */
import { say } from "./command.ts";
import { Errno, type ServiceCalls, serviceCalls } from "./libc.ts";
import { quote } from "./protocol.ts";

/** A manager that takes nothing for so long is given up. */
const SEND_MS = 5_000;
const RETRY_MS = 10;

/** Messages keep their order. */
let sent: Promise<void> = Promise.resolve();
let warned = false;

/**
 * `READY=1`, `STOPPING=1`: see sd_notify(3). Resolves when this and all before it is sent, or cannot be, which is said on
 * stderr, once.
 */
export function notify(state: string): Promise<void> {
  const address = process.env.NOTIFY_SOCKET;
  if (address) sent = sent.then(() => tell(address, state));
  return sent;
}

/** To be followed by `notify("READY=1")` when it is done. */
export function notifyReloading(): Promise<void> {
  if (!process.env.NOTIFY_SOCKET) return sent;
  // When it began, which only `Type=notify-reload` asks for.
  const micros = serviceCalls()?.monotonicMicros();
  return notify(micros === undefined ? "RELOADING=1" : `RELOADING=1\nMONOTONIC_USEC=${micros}`);
}

async function tell(address: string, state: string): Promise<void> {
  const calls = serviceCalls();
  const problem = calls ? await send(calls, address, state) : await sendByCommand(state);
  if (problem === undefined || warned) return;
  warned = true;
  say("warn", problem);
}

async function send(calls: ServiceCalls, address: string, state: string): Promise<string | undefined> {
  const end = performance.now() + SEND_MS;
  let result = calls.sendDatagram(address, state);
  while (result === -Errno.EAGAIN && performance.now() < end) {
    await Bun.sleep(RETRY_MS);
    result = calls.sendDatagram(address, state);
  }
  if (result === 0) return undefined;
  return `the service manager is not told ${quote(state)}: NOTIFY_SOCKET ${quote(address)} takes nothing (errno ${-result})`;
}

/** The command ends when the manager has read what it sent. */
async function sendByCommand(state: string): Promise<string> {
  const command = Bun.which("systemd-notify");
  if (!command) return "the service manager is told nothing: there is neither bun:ffi nor systemd-notify";
  const child = Bun.spawn({
    cmd: [command, ...state.split("\n")],
    stdio: ["ignore", "ignore", "inherit"],
    timeout: SEND_MS,
  });
  if ((await child.exited) !== 0) return `the service manager is not told ${quote(state)}: systemd-notify failed`;
  return "without bun:ffi the service manager is told by systemd-notify: the unit needs NotifyAccess=all";
}
