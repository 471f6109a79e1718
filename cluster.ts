/** The keeper. */
import type { KeeperSettings } from "./hub.ts";

export function keep(_settings: KeeperSettings): void {}
